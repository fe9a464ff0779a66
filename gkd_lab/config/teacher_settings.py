"""Teachers of a cell as an experiment states them: numbers of named teachers, placement, cached scores."""

from collections.abc import Iterable, Mapping
from typing import Any

from gkd_lab.config.artifact_specs import TeacherScores
from gkd_lab.config.errors import ConfigError, suggest_choices
from gkd_lab.config.loss_terms import (
    FIRST_TEACHER,
    CrossEntropyConfig,
    DivergenceConfig,
    ResolvedReward,
    ResolvedTerm,
    TermConfig,
)
from gkd_lab.config.settings import ModelSettings

START_TEACHER = "start"
"""Name of the SFT student, frozen, as a teacher."""


def number_teachers(terms: Iterable[TermConfig]) -> dict[str | int, int]:
    """Return teacher name -> number: the run's own is 0, others follow as divergences name them."""
    names = [name for term in terms if isinstance(term, DivergenceConfig) for name in term.teacher_names]
    return {name: number for number, name in enumerate(dict.fromkeys([FIRST_TEACHER, *names]))}


def resolve_extra_teachers(terms: Iterable[TermConfig], teachers: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> settings of the named teachers besides the first, in the order of their numbers.

    `start` maps to itself. A teacher that no divergence names is left out, because objectives may be an axis.
    Raises ConfigError for an unknown or a reserved name.
    """
    for reserved in (FIRST_TEACHER, START_TEACHER):
        if reserved in teachers:
            raise ConfigError(f"teachers: the name {reserved!r} is reserved; choose another name")
    valid_teachers: dict[str | int, Any] = {FIRST_TEACHER: None, START_TEACHER: START_TEACHER}
    valid_teachers.update(teachers)
    names = list(number_teachers(terms))
    for name in names:
        if name not in valid_teachers:
            raise ConfigError(
                f"objectives: unknown teacher {name!r}; {suggest_choices(name, valid_teachers)}; a folder or "
                "hub name (owner/name) gets a name under `teachers`"
            )
    return {str(name): valid_teachers[name] for name in names if name != FIRST_TEACHER}


def resolve_teacher_placements(teachers: Iterable[str | ModelSettings | None]) -> dict[str, Any]:
    """Return {"teacher_dtypes", "parked"} of a Training, one entry per teacher; () where all are default."""
    settings = [teacher if isinstance(teacher, ModelSettings) else ModelSettings() for teacher in teachers]
    dtypes = tuple(teacher.dtype for teacher in settings)
    parked = tuple(bool(teacher.parked) for teacher in settings)
    return {"teacher_dtypes": dtypes if any(dtypes) else (), "parked": parked if any(parked) else ()}


def parse_teacher_scores(stated: str | TeacherScores | None) -> TeacherScores | None:
    """Return the format of cached teacher scores; None for `live`, or if nothing is stated."""
    if isinstance(stated, TeacherScores):
        return stated
    return TeacherScores() if stated == "full" else None


def drop_unused_scores(scores: TeacherScores | None, terms: Iterable[ResolvedTerm]) -> TeacherScores | None:
    """Return `scores`, or None if every term is cross-entropy or a reward, which read no teacher."""
    uses_teacher = any(not isinstance(term, CrossEntropyConfig | ResolvedReward) for term in terms)
    return scores if uses_teacher else None
