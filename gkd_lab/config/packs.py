"""Which cells are trained as one model: a function of the experiment's full cell list and the limit.

It never depends on what is left to do, so that a resumed run meets the same packs.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from gkd_lab.config.cell import Cell, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.fingerprint import Frozen, canonical_json

PackLimit = int | Literal["auto", "off"]
AUTO_PACK_SIZE = 16
"""The most cells per pack where nothing is said; a run makes smaller ones of them where memory is short."""

_PER_CELL_FIELDS = ("objectives", "source", "seed")
"""Fields in which the cells of a pack may differ; each keeps its own learning rate as well."""


def parse_pack_limit(text: str) -> PackLimit:
    """`auto`, `off` or a number of cells. Raises SpecError."""
    if text == "auto":
        return "auto"
    if text == "off":
        return "off"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigError(f"--pack {text!r}: expected auto, off or a number of cells from 1")


def group_cells_into_packs(cells: Sequence[Cell], limit: PackLimit) -> list[list[Cell]]:
    """The cells in groups of at most `limit`, each sorted by (seed, lmbda, beta), total variation last."""
    groups: dict[str, list[Cell]] = {}
    known: dict[tuple[Any, ...], str] = {}
    for cell in cells:
        key = _build_identity_key(cell.training)
        if key not in known:
            known[key] = _serialize_shared_fields(cell.training)
        groups.setdefault(known[key], []).append(cell)
    found = []
    for group in groups.values():
        size = _get_pack_size(group[0], limit)
        group.sort(key=_build_sort_key)
        found += [group[n : n + size] for n in range(0, len(group), size)]
    return found


def explain_unpackable(cell: Cell) -> str | None:
    """Why a cell cannot share a pack; None where nothing but its student's architecture can be against it.

    Both optimizers that a cell can have act on each member of a pack as on a model of its own.
    """
    if cell.training.dropout > 0:
        return "dropout draws from one stream"
    return None


def split_evenly(cell_count: int, max_cells: int) -> list[int]:
    """Sizes of the fewest packs of at most `limit` cells, larger ones first.

    What is left after the first pack is parted as it was before: a resumed run meets the same packs.
    """
    count = math.ceil(cell_count / max_cells)
    return [cell_count // count + (n < cell_count % count) for n in range(count)]


def _build_sort_key(cell: Cell) -> tuple[int, float, float, str]:
    return cell.seed, cell.lmbda, math.inf if cell.beta is None else cell.beta, cell.fingerprint


def _get_pack_size(cell: Cell, limit: PackLimit) -> int:
    if limit == "off" or explain_unpackable(cell):
        return 1
    return AUTO_PACK_SIZE if limit == "auto" else limit


def _build_identity_key(training: Training) -> tuple[Any, ...]:
    """Equal for trainings that refer to the same objects: most cells of a grid do."""
    values = (getattr(training, name) for name in _SHARED_FIELDS)
    return (*(id(value) if isinstance(value, Frozen) else value for value in values), training.source.text)


_SHARED_FIELDS = tuple(name for name in Training.model_fields if name not in _PER_CELL_FIELDS)


def _serialize_shared_fields(training: Training) -> str:
    shared = {name: getattr(training, name) for name in _SHARED_FIELDS}
    optimizer = training.optimizer.model_dump(exclude={"learning_rate"})
    # Rows are common to a pack, so who wrote them is.
    return canonical_json({**shared, "optimizer": optimizer, "text": training.source.text})
