"""Group the cells of a grid into packs: cells that train as one model.

The packs depend on the experiment's full list of cells and the limit, never on what is left to do: a resumed
run gets the same packs.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Cell, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.fingerprint import canonical_json, replace_fields

PackLimit = int | Literal["auto", "off"]
AUTO_PACK_SIZE = 16
"""Largest pack with the limit `auto`. A run splits it further if memory is short."""

_PER_CELL_FIELDS = ("objectives", "source", "seed")
"""Fields in which the cells of a pack may differ, besides the learning rate."""
_SHARED_FIELDS = tuple(name for name in Training.model_fields if name not in _PER_CELL_FIELDS)
_get_shared_fields = attrgetter(*_SHARED_FIELDS)


def parse_pack_limit(text: str) -> PackLimit:
    """Return `auto`, `off` or a number of cells from the text of --pack. Raises ConfigError."""
    if text == "auto":
        return "auto"
    if text == "off":
        return "off"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigError(f"--pack {text!r}: expected auto, off or a number of cells from 1")


def group_cells_into_packs(cells: Sequence[Cell], limit: PackLimit) -> list[list[Cell]]:
    """Return lists of at most `limit` cells that train as one model, sorted by (seed, lmbda, beta).

    Cells without beta (total variation) come last.
    """
    groups: dict[str, list[Cell]] = {}
    texts: dict[tuple[int, ...], str] = {}
    """Ids of what a cell shares -> its canonical JSON: most cells of a large grid share the same objects."""
    for cell in cells:
        key = tuple(map(id, _list_shared_values(cell.training)))
        if key not in texts:
            texts[key] = _serialize_shared_fields(cell.training)
        groups.setdefault(texts[key], []).append(cell)
    packs = []
    for group in groups.values():
        size = _get_pack_size(group[0], limit)
        group.sort(key=_build_sort_key)
        packs += [group[start : start + size] for start in range(0, len(group), size)]
    return packs


def fingerprint_pack_group(cell: Cell) -> str:
    """Return a hash of all that the cells of a pack share: equal for cells that may share a model."""
    return hashlib.sha256(_serialize_shared_fields(cell.training).encode()).hexdigest()


def explain_unpackable(cell: Cell) -> str | None:
    """Return the reason why a cell must train alone (TRL, dropout, LoRA), or None if its spec allows packing.

    Only the student's architecture can forbid it later: both optimizers act on each member separately.
    """
    if cell.training.implementation == "trl":
        return "TRL's trainer trains one student"
    if cell.training.dropout > 0:
        return "dropout draws from one stream"
    if cell.training.lora is not None:
        return "a LoRA adapter has no packed form"
    return None


def split_evenly(cell_count: int, max_cells: int) -> list[int]:
    """Return the sizes of the fewest packs of at most `max_cells` cells, larger packs first.

    Splitting what is left after the first pack gives the same sizes, so a resumed run gets the same packs.
    """
    pack_count = math.ceil(cell_count / max_cells)
    return [cell_count // pack_count + (index < cell_count % pack_count) for index in range(pack_count)]


def _build_sort_key(cell: Cell) -> tuple[int, float, float, str]:
    """Return (seed, lmbda, beta or infinity, fingerprint), which orders cells inside a pack."""
    return cell.seed, cell.lmbda, math.inf if cell.beta is None else cell.beta, cell.fingerprint


def _get_pack_size(cell: Cell, limit: PackLimit) -> int:
    """Return the largest pack size for cells like `cell`: 1 if it must train alone, 16 with `auto`."""
    if limit == "off" or explain_unpackable(cell):
        return 1
    return AUTO_PACK_SIZE if limit == "auto" else limit


@lru_cache(maxsize=1024)
def drop_model_seeds(model: SftModel) -> SftModel:
    """Return a model without the seeds of its weights and SFT: members may have starts of their own."""
    sft = None if model.sft is None else replace_fields(model.sft, seed=0)
    return replace_fields(model, model=replace_fields(model.model, init_seed=0), sft=sft)


def _list_shared_values(training: Training) -> list[Any]:
    """Return the values that `_serialize_shared_fields` reads."""
    return [*_get_shared_fields(training), training.source.text, training.source.corrupted]


def _serialize_shared_fields(training: Training) -> str:
    """Return canonical JSON of all that a pack's cells must share; equal text means one group."""
    fields = dict(zip(_SHARED_FIELDS, _get_shared_fields(training), strict=True))
    if training.start not in training.teachers:  # a teacher serves the whole pack
        fields["start"] = drop_model_seeds(training.start)
    optimizer = training.optimizer.model_dump(exclude={"learning_rate"})
    # The cells of a pack train on the same rows, so these texts must be the same.
    source = training.source
    fields |= {"optimizer": optimizer, "text": source.text, "corrupted": source.corrupted}
    return canonical_json(fields)
