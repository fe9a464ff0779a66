"""Every record of an experiment read again, and what no longer matches its fingerprint. No torch."""

from collections.abc import Callable
from pathlib import Path

from gkd_lab.config import Grid
from gkd_lab.config.cell import list_references
from gkd_lab.metrics import Scorer
from gkd_lab.status.verify_record import RecordVerifier, VerificationResult, list_revisions
from gkd_lab.store import Record, Store

ProgressCallback = Callable[[int], None]


def list_candidate_records(grid: Grid, store: Store) -> list[Record]:
    """What may belong to the experiment: all that was begun for its tasks at its scale."""
    tasks = dict.fromkeys(cell.task for cell in grid.cells)
    paths = (path for task in tasks for path in sorted((store.root / grid.scale / task).glob("*-*")))
    return [Record(path) for path in paths if path.is_dir()]


def verify_records(
    grid: Grid, store: Store, records: list[Record], report_progress: ProgressCallback = lambda done: None
) -> VerificationResult:
    """Read these records again; `grid` must be resolved from data and models as they are now.

    Of another experiment's records only those are reported whose data or models have changed: they may
    have been this one's before.
    """
    outcome, sources, scorer = VerificationResult(), _collect_revisions(grid), Scorer()
    ours = _list_experiment_folders(grid, store)
    there = {record.folder for record in records}
    outcome.missing = sum(store.get_record(cell).folder not in there for cell in grid.cells)
    for done, record in enumerate(records, 1):
        if record.folder in ours:
            RecordVerifier(store, record, outcome, scorer).verify_record(sources)
        else:
            RecordVerifier(store, record, outcome, scorer).verify_revisions(sources)
        report_progress(done)
    return outcome


def _list_experiment_folders(grid: Grid, store: Store) -> set[Path]:
    known = {store.get_record(cell).folder for cell in grid.cells}
    known |= {
        store.get_artifact(grid.scale, role, model).folder for role, model, _ in list_references(grid.cells)
    }
    texts = (cell.training.text_spec for cell in grid.cells)
    known |= {store.get_teacher_text(grid.scale, text).folder for text in texts if text is not None}
    scores = (cell.training.scores_spec for cell in grid.cells)
    return known | {store.get_teacher_scores(grid.scale, one).folder for one in scores if one is not None}


def _collect_revisions(grid: Grid) -> dict[tuple[str, ...], str]:
    return {key: revision for cell in grid.cells for key, revision in list_revisions(cell.training)}
