"""Every record of an experiment read again, and what no longer matches its fingerprint. No torch."""

from collections.abc import Callable
from pathlib import Path

from gkd_lab.config import GridOfCells
from gkd_lab.config.cell import references
from gkd_lab.metrics import Scorer
from gkd_lab.status.verify_record import Reading, Verified, revisions_of
from gkd_lab.store import Record, Store

Advance = Callable[[int], None]


def candidates(grid: GridOfCells, store: Store) -> list[Record]:
    """What may belong to the experiment: all that was begun for its tasks at its scale."""
    tasks = dict.fromkeys(cell.task for cell in grid.cells)
    paths = (path for task in tasks for path in sorted((store.root / grid.scale / task).glob("*-*")))
    return [Record(path) for path in paths if path.is_dir()]


def verify(
    grid: GridOfCells, store: Store, found: list[Record], advance: Advance = lambda done: None
) -> Verified:
    """Read these records again; `grid` must be resolved from data and models as they are now.

    Of another experiment's records only those are reported whose data or models have changed: they may
    have been this one's before.
    """
    outcome, sources, scorer = Verified(), _sources(grid), Scorer()
    ours = _folders(grid, store)
    there = {record.folder for record in found}
    outcome.missing = sum(store.of(cell).folder not in there for cell in grid.cells)
    for done, record in enumerate(found, 1):
        if record.folder in ours:
            Reading(store, record, outcome, scorer).whole(sources)
        else:
            Reading(store, record, outcome, scorer).sources_only(sources)
        advance(done)
    return outcome


def _folders(grid: GridOfCells, store: Store) -> set[Path]:
    known = {store.of(cell).folder for cell in grid.cells}
    known |= {store.artifact(grid.scale, role, model).folder for role, model, _ in references(grid.cells)}
    texts = (cell.training.text for cell in grid.cells)
    known |= {store.text(grid.scale, text).folder for text in texts if text is not None}
    scores = (cell.training.scores for cell in grid.cells)
    return known | {store.scores(grid.scale, one).folder for one in scores if one is not None}


def _sources(grid: GridOfCells) -> dict[tuple[str, ...], str]:
    return {key: revision for cell in grid.cells for key, revision in revisions_of(cell.training)}
