"""Which cells are trained as one model: a function of the experiment's full cell list and the limit.

It never depends on what is left to do, so that a resumed run meets the same packs.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from gkd_lab.config.cell import Cell, Training
from gkd_lab.config.errors import SpecError
from gkd_lab.config.fingerprint import Frozen, canonical

PackLimit = int | Literal["auto", "off"]
AUTO = 16
"""The most cells per pack where nothing is said; a run makes smaller ones of them where memory is short."""

_OWN = ("objectives", "source", "seed")
"""Fields in which the cells of a pack may differ; each keeps its own learning rate as well."""


def parse_limit(text: str) -> PackLimit:
    """`auto`, `off` or a number of cells. Raises SpecError."""
    if text == "auto":
        return "auto"
    if text == "off":
        return "off"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise SpecError(f"--pack {text!r}: expected auto, off or a number of cells from 1")


def packs(cells: Sequence[Cell], limit: PackLimit) -> list[list[Cell]]:
    """The cells in groups of at most `limit`, each sorted by (seed, lmbda, beta), total variation last."""
    groups: dict[str, list[Cell]] = {}
    known: dict[tuple[Any, ...], str] = {}
    for cell in cells:
        key = _seen(cell.training)
        if key not in known:
            known[key] = _common(cell.training)
        groups.setdefault(known[key], []).append(cell)
    found = []
    for group in groups.values():
        size = _size(group[0], limit)
        group.sort(key=_order)
        found += [group[n : n + size] for n in range(0, len(group), size)]
    return found


def why_alone(cell: Cell) -> str | None:
    """Why a cell cannot share a pack; None where nothing but its student's architecture can be against it.

    Both optimizers that a cell can have act on each member of a pack as on a model of its own.
    """
    if cell.training.dropout > 0:
        return "dropout draws from one stream"
    return None


def evenly(cells: int, limit: int) -> list[int]:
    """Sizes of the fewest packs of at most `limit` cells, larger ones first.

    What is left after the first pack is parted as it was before: a resumed run meets the same packs.
    """
    count = math.ceil(cells / limit)
    return [cells // count + (n < cells % count) for n in range(count)]


def _order(cell: Cell) -> tuple[int, float, float, str]:
    return cell.seed, cell.lmbda, math.inf if cell.beta is None else cell.beta, cell.fingerprint


def _size(cell: Cell, limit: PackLimit) -> int:
    if limit == "off" or why_alone(cell):
        return 1
    return AUTO if limit == "auto" else limit


def _seen(training: Training) -> tuple[Any, ...]:
    """Equal for trainings that refer to the same objects: most cells of a grid do."""
    values = (getattr(training, name) for name in _SHARED)
    return (*(id(value) if isinstance(value, Frozen) else value for value in values), training.source.text)


_SHARED = tuple(name for name in Training.model_fields if name not in _OWN)


def _common(training: Training) -> str:
    shared = {name: getattr(training, name) for name in _SHARED}
    optimizer = training.optimizer.model_dump(exclude={"learning_rate"})
    # Rows are common to a pack, so who wrote them is.
    return canonical({**shared, "optimizer": optimizer, "text": training.source.text})
