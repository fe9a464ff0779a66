"""Which of several teachers each row is meant for, as the data's column `teacher` says."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from gkd_lab.config.errors import suggest_choices
from gkd_lab.config.loss_terms import ResolvedDivergence, ResolvedTerm
from gkd_lab.encoding.batches import Example
from gkd_lab.tasks import Row


def assign_teachers(
    examples: Sequence[Example], rows: Sequence[Row], objectives: Iterable[ResolvedTerm]
) -> list[Example]:
    """The same rows, each with its teacher's number, where a divergence is routed.

    Raises ValueError for a row that names none of the teachers.
    """
    numbers: dict[str, int] = {}
    for one in objectives:
        if isinstance(one, ResolvedDivergence) and one.routes is not None:
            numbers |= dict(zip(one.routes, one.teachers, strict=True))
    if not numbers:
        return list(examples)
    return [
        replace(example, teacher_index=_find_teacher_number(row, place, numbers))
        for place, (example, row) in enumerate(zip(examples, rows, strict=True))
    ]


def _find_teacher_number(row: Row, row_index: int, numbers: dict[str, int]) -> int:
    if row.teacher is None:
        raise ValueError(
            f"a divergence is routed, and row {row_index} of the train split names no teacher: give the data a "
            f"column `teacher` with {' or '.join(map(repr, numbers))}"
        )
    if row.teacher not in numbers:
        raise ValueError(
            f"row {row_index} of the train split is meant for the teacher {row.teacher!r}, which no routed "
            f"divergence has; {suggest_choices(row.teacher, numbers)}"
        )
    return numbers[row.teacher]
