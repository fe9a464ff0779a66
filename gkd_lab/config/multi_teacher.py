"""Several teachers, as an experiment names them: which there are, and their numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

from gkd_lab.config.cell import Training
from gkd_lab.config.errors import SpecError, nearest
from gkd_lab.config.loss_terms import FIRST_TEACHER, AnyObjective, AnyObjectiveSettings, Divergent, Objective

START = "start"
"""Name of the student as it starts, frozen, where it is a teacher."""


def numbered(objectives: Iterable[AnyObjectiveSettings]) -> dict[str, int]:
    """Number of each teacher that a divergence names; the run's own is 0, others follow as they appear."""
    named = [name for one in objectives if isinstance(one, Divergent) for name in one.teacher_names]
    return {name: number for number, name in enumerate(dict.fromkeys([FIRST_TEACHER, *named]))}


def more_teachers(objectives: Iterable[AnyObjectiveSettings], teachers: Mapping[str, Any]) -> dict[str, Any]:
    """Those besides the first, by name, in the order of their numbers; `start` stands for itself.

    One that no divergence names is left out: objectives may be an axis. Raises SpecError for a name that
    `teachers` has not, numbers that do not fit the names, and a reserved name.
    """
    listed = list(objectives)
    for name in (FIRST_TEACHER, START):
        if name in teachers:
            raise SpecError(f"teachers: {name!r} has a meaning already; choose another name")
    for one in listed:
        if isinstance(one, Divergent):
            _check(one)
    known = {FIRST_TEACHER: None, START: START, **teachers}
    for name in numbered(listed):
        if name not in known:
            raise SpecError(f"objectives: unknown teacher {name!r}; {nearest(name, known)}")
    return {name: known[name] for name in numbered(listed) if name != FIRST_TEACHER}


def check_holds(training: Training) -> None:
    """Raises SpecError where all that a student is held to is itself as it starts, which teaches nothing."""
    if training.dropout == 0 and all(_holds(one, training) for one in training.objectives):
        raise SpecError(
            "objectives: every divergence is from `start`, the student as it starts, so that nothing can be "
            "learnt: add one from another teacher, or a reward"
        )


def _holds(one: AnyObjective, training: Training) -> bool:
    """Whether a divergence is 0 as long as the student has not moved."""
    if not isinstance(one, Objective) or one.mixture_temperatures is not None or 0 in one.teachers:
        return False
    same = all(training.teachers[n - 1] == training.start for n in one.teachers)
    # Sharpened or flattened it is another distribution, and in another dtype nearly so.
    held = any(training.held(n)[0] for n in one.teachers)
    return same and not held and one.teacher_temperature == one.student_temperature


def _check(one: Divergent) -> None:
    count = len(one.teacher_names)
    if not count:
        raise SpecError("objectives: teacher []: name one at least, or leave `teacher` out for the run's own")
    if len(set(one.teacher_names)) < count:
        raise SpecError(f"objectives: teacher {list(one.teacher_names)} names one of them twice")
    for field in ("mixture", "mixture_temperatures"):
        values = getattr(one, field)
        if values is not None and len(values) != count:
            raise SpecError(f"objectives: {len(values)} numbers in {field} for {count} teachers: one of each")
    if one.mixture is not None and abs(sum(one.mixture) - 1) > 1e-6:
        raise SpecError(f"objectives: mixture {list(one.mixture)} must sum to 1, not {sum(one.mixture):g}")
    if one.routed and (count == 1 or one.mixture is not None):
        raise SpecError(
            "objectives: routed takes one of several teachers for each row: name them in `teacher`, and "
            "leave `mixture` out"
        )
