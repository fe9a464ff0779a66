"""Pack limits that an outputs folder keeps: the first process finds them, all later ones follow.

Otherwise the packs under `--pack auto` would depend on the workers and the free memory of each process, and
the results of a run that was resumed elsewhere would differ by rounding. `.packs/limits.json` has entries:

    grid 1a2b3c4d              largest packs of a grid: its cells shared among the workers of the first run
    training 5e6f7a8b cpu      cells of one group that fit into the memory of a kind of device, in training
    evaluation 5e6f7a8b cpu    the same in evaluation

An entry is lowered when memory was short nevertheless; to have it found again, delete it or the file.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gkd_lab.config.cell import Cell
from gkd_lab.config.fingerprint import SHOWN_DIGITS
from gkd_lab.config.packs import AUTO_PACK_SIZE, PackLimit, fingerprint_pack_group
from gkd_lab.store.files import read_json, write_json
from gkd_lab.store.lock import FolderLock

Stage = Literal["training", "evaluation"]


@dataclass(frozen=True)
class KeptLimit:
    """Largest number of cells that share a model, and why it is that."""

    cells: int
    reason: str = ""
    was_killed: bool = False
    """Whether the kernel killed a process with more cells; then the limit holds for `--pack K` too."""
    micro_batches: int = 1
    """Parts that a step's batch is split into from the start, where a single cell was too large."""


class PackLimits:
    """The kept limits of one outputs folder."""

    def __init__(self, outputs: Path) -> None:
        self.folder = outputs / ".packs"
        self.path = self.folder / "limits.json"

    def read_grid_limit(self, cells: Sequence[Cell]) -> KeptLimit | None:
        """Return the largest packs of a grid's cells that a first run has decided on; None before."""
        return self._read(_name_grid(cells))

    def find_grid_limit(self, cells: Sequence[Cell], limit: PackLimit) -> PackLimit:
        """Return the limit to group a grid's cells by: for `auto` the kept one, if any. Writes nothing."""
        kept = self.read_grid_limit(cells) if limit == "auto" else None
        return limit if kept is None else kept.cells

    def resolve_grid_limit(self, cells: Sequence[Cell], limit: PackLimit, workers: int = 1) -> PackLimit:
        """Return the limit to group a grid's cells by: for `auto` the kept one, decided now if there is none.

        That is 16 cells, or fewer so that each of the `workers` gets a pack.
        """
        if limit != "auto" or len(cells) < 2:
            return limit
        share = min(AUTO_PACK_SIZE, max(1, math.ceil(len(cells) / workers)))
        reason = f"{workers} workers" if share < AUTO_PACK_SIZE and workers > 1 else ""
        return self.keep_grid_limit(cells, share, reason)

    def keep_grid_limit(self, cells: Sequence[Cell], proposed: int, reason: str = "") -> int:
        """Return the limit of a grid's cells, which is `proposed` if no process has kept one yet."""
        return self._keep_first(_name_grid(cells), KeptLimit(proposed, reason)).cells

    def read_capacity(self, cell: Cell, stage: Stage, device: str) -> KeptLimit | None:
        """Return how many cells like `cell` fit into a kind of device; None before it was measured."""
        return self._read(_name_group(cell, stage, device))

    def keep_capacity(self, cell: Cell, stage: Stage, device: str, found: KeptLimit) -> KeptLimit:
        """Return the kept capacity of cells like `cell`, which is `found` if there was none."""
        return self._keep_first(_name_group(cell, stage, device), found)

    def lower_capacity(self, cell: Cell, stage: Stage, device: str, lowered: KeptLimit) -> bool:
        """Replace the capacity of cells like `cell` by a lower one; return whether it was higher or unknown.

        What was replaced goes to the entry's `history`.
        """
        name = _name_group(cell, stage, device)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.folder):
            entries = self._read_entries()
            kept = _parse_entry(entries.get(name))
            if kept is not None and not _is_lower(lowered, kept):
                return False
            old_entry = entries.get(name) or {}
            history = [*old_entry.pop("history", []), *([old_entry] if old_entry else [])]
            write_json(self.path, {**entries, name: {**asdict(lowered), "history": history}})
            return True

    def iterate_lowered(self, cells: Iterable[Cell]) -> Iterator[tuple[Stage, str, KeptLimit]]:
        """Yield (stage, kind of device, limit) of the groups of `cells` whose packs memory limits."""
        entries = self._read_entries()
        groups = {fingerprint_pack_group(cell)[:SHOWN_DIGITS] for cell in cells} if entries else set()
        for name, entry in entries.items():
            stage, _, rest = name.partition(" ")
            group, _, device = rest.partition(" ")
            limit = _parse_entry(entry)
            if stage in ("training", "evaluation") and group in groups and limit and limit.reason:
                yield "training" if stage == "training" else "evaluation", device, limit

    def _keep_first(self, name: str, found: KeptLimit) -> KeptLimit:
        """Return the entry of a name, written now if there was none."""
        kept = self._read(name)
        if kept is not None:
            return kept
        self.folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.folder):
            entries = self._read_entries()
            kept = _parse_entry(entries.get(name))
            if kept is None:
                write_json(self.path, {**entries, name: asdict(found)})
        return kept or found

    def _read(self, name: str) -> KeptLimit | None:
        """Return the entry of a name, None if there is none."""
        return _parse_entry(self._read_entries().get(name))

    def _read_entries(self) -> dict[str, Any]:
        """Return name -> entry of the file; {} without a file."""
        return read_json(self.path) or {}


def _is_lower(limit: KeptLimit, kept: KeptLimit) -> bool:
    """Return whether a limit takes less memory than another: fewer cells, or smaller micro-batches."""
    return (limit.cells, -limit.micro_batches) < (kept.cells, -kept.micro_batches)


def _parse_entry(entry: Any) -> KeptLimit | None:
    """Return the limit in an entry of the file; None for a missing or damaged one."""
    if not isinstance(entry, dict) or not isinstance(entry.get("cells"), int) or entry["cells"] < 1:
        return None
    known = KeptLimit.__dataclass_fields__
    return KeptLimit(**{name: value for name, value in entry.items() if name in known})


def _name_grid(cells: Sequence[Cell]) -> str:
    """Return the name of a grid's entry: a hash of the fingerprints of its cells, in any order."""
    fingerprints = sorted(cell.full_fingerprint for cell in cells)
    return f"grid {hashlib.sha256(' '.join(fingerprints).encode()).hexdigest()[:SHOWN_DIGITS]}"


def _name_group(cell: Cell, stage: Stage, device: str) -> str:
    """Return the name of the entry of all cells that may share a model with `cell`."""
    return f"{stage} {fingerprint_pack_group(cell)[:SHOWN_DIGITS]} {device}"
