"""Which of several teachers each row is meant for, as the data's column `teacher` says."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from gkd_lab.config.errors import nearest
from gkd_lab.config.loss_terms import AnyObjective, Objective
from gkd_lab.encoding.batches import Example
from gkd_lab.tasks import Row


def with_routes(
    found: Sequence[Example], rows: Sequence[Row], objectives: Iterable[AnyObjective]
) -> list[Example]:
    """The same rows, each with its teacher's number, where a divergence is routed.

    Raises ValueError for a row that names none of the teachers.
    """
    numbers: dict[str, int] = {}
    for one in objectives:
        if isinstance(one, Objective) and one.routes is not None:
            numbers |= dict(zip(one.routes, one.teachers, strict=True))
    if not numbers:
        return list(found)
    return [
        replace(example, route=_number(row, place, numbers))
        for place, (example, row) in enumerate(zip(found, rows, strict=True))
    ]


def _number(row: Row, place: int, numbers: dict[str, int]) -> int:
    if row.teacher is None:
        raise ValueError(
            f"a divergence is routed, and row {place} of the train split names no teacher: give the data a "
            f"column `teacher` with {' or '.join(map(repr, numbers))}"
        )
    if row.teacher not in numbers:
        raise ValueError(
            f"row {place} of the train split is meant for the teacher {row.teacher!r}, which no routed "
            f"divergence has; {nearest(row.teacher, numbers)}"
        )
    return numbers[row.teacher]
