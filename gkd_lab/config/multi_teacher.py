"""Several teachers, as an experiment names them: which there are, and their numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

from gkd_lab.config.cell import Training
from gkd_lab.config.errors import ConfigError, suggest_choices
from gkd_lab.config.loss_terms import (
    FIRST_TEACHER,
    DivergenceConfig,
    ResolvedDivergence,
    ResolvedTerm,
    TermConfig,
)

START_TEACHER = "start"
"""Name of the student as it starts, frozen, where it is a teacher."""


def number_teachers(objectives: Iterable[TermConfig]) -> dict[str, int]:
    """Number of each teacher that a divergence names; the run's own is 0, others follow as they appear."""
    named = [name for one in objectives if isinstance(one, DivergenceConfig) for name in one.teacher_names]
    return {name: number for number, name in enumerate(dict.fromkeys([FIRST_TEACHER, *named]))}


def resolve_extra_teachers(objectives: Iterable[TermConfig], teachers: Mapping[str, Any]) -> dict[str, Any]:
    """Those besides the first, by name, in the order of their numbers; `start` stands for itself.

    One that no divergence names is left out: objectives may be an axis. Raises SpecError for a name that
    `teachers` has not, numbers that do not fit the names, and a reserved name.
    """
    listed = list(objectives)
    for name in (FIRST_TEACHER, START_TEACHER):
        if name in teachers:
            raise ConfigError(f"teachers: {name!r} has a meaning already; choose another name")
    for one in listed:
        if isinstance(one, DivergenceConfig):
            _check_teacher_fields(one)
    known = {FIRST_TEACHER: None, START_TEACHER: START_TEACHER, **teachers}
    for name in number_teachers(listed):
        if name not in known:
            raise ConfigError(f"objectives: unknown teacher {name!r}; {suggest_choices(name, known)}")
    return {name: known[name] for name in number_teachers(listed) if name != FIRST_TEACHER}


def check_not_only_own_start(training: Training) -> None:
    """Raises SpecError where all that a student is held to is itself as it starts, which teaches nothing."""
    if training.dropout == 0 and all(_compares_with_own_start(one, training) for one in training.objectives):
        raise ConfigError(
            "objectives: every divergence is from `start`, the student as it starts, so that nothing can be "
            "learnt: add one from another teacher, or a reward"
        )


def _compares_with_own_start(term: ResolvedTerm, training: Training) -> bool:
    """Whether a divergence is 0 as long as the student has not moved."""
    if (
        not isinstance(term, ResolvedDivergence)
        or term.mixture_temperatures is not None
        or 0 in term.teachers
    ):
        return False
    same = all(training.teachers[n - 1] == training.start for n in term.teachers)
    # Sharpened or flattened it is another distribution, and in another dtype nearly so.
    held = any(training.get_teacher_placement(n)[0] for n in term.teachers)
    return same and not held and term.teacher_temperature == term.student_temperature


def _check_teacher_fields(term: DivergenceConfig) -> None:
    count = len(term.teacher_names)
    if not count:
        raise ConfigError(
            "objectives: teacher []: name one at least, or leave `teacher` out for the run's own"
        )
    if len(set(term.teacher_names)) < count:
        raise ConfigError(f"objectives: teacher {list(term.teacher_names)} names one of them twice")
    for field in ("mixture", "mixture_temperatures"):
        values = getattr(term, field)
        if values is not None and len(values) != count:
            raise ConfigError(
                f"objectives: {len(values)} numbers in {field} for {count} teachers: one of each"
            )
    if term.mixture is not None and abs(sum(term.mixture) - 1) > 1e-6:
        raise ConfigError(
            f"objectives: mixture {list(term.mixture)} must sum to 1, not {sum(term.mixture):g}"
        )
    if term.routed and (count == 1 or term.mixture is not None):
        raise ConfigError(
            "objectives: routed takes one of several teachers for each row: name them in `teacher`, and "
            "leave `mixture` out"
        )
