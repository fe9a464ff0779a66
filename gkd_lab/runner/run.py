"""An experiment from its first artifact to its last evaluation; what is done is not done again."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gkd_lab.config import Grid
from gkd_lab.config.cell import Cell, Reference, list_references
from gkd_lab.config.packs import AUTO_PACK_SIZE, group_cells_into_packs
from gkd_lab.runner import artifacts
from gkd_lab.runner.cell_locks import PackLock
from gkd_lab.runner.evaluate_cells import evaluate_cells, evaluate_reference
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.train_cells import train_cells
from gkd_lab.store import Record, RecordPart

POLL_SECONDS = 1.0
"""Seconds between two looks at cells that other processes work on."""


@dataclass
class RunOutcome:
    """What a run left behind."""

    failures: list[str] = field(default_factory=list)
    """A line for each failure: what, why, where the log is."""
    busy_cell_count: int = 0
    """Cells that another process is working on."""


def run_grid(grid: Grid, options: RunOptions) -> RunOutcome:
    """Train and evaluate every cell of the grid and its reference models.

    Cells that other processes hold are passed over and come last, when they are waited for or left.
    """
    outcome = RunOutcome()
    broken = _prepare_references(grid, options, outcome)
    tried, elsewhere = [], []
    for group in split_packs(grid.cells, options):
        training = group[0].training
        needed = (model.full_fingerprint for _, model in training.reference_models)
        why = next((broken[model] for model in needed if model in broken), None)
        if why is not None:
            _report_skipped_cells(group, "failed", why, options)
            continue
        tried += group
        if left := _lock_and_run_pack(group, options):
            elsewhere.append(left)
    if options.busy_cells == "wait":
        _wait_and_run_busy_cells(elsewhere, options)
    else:
        outcome.busy_cell_count = sum(map(len, elsewhere))
        for group in elsewhere:
            _report_skipped_cells(group, "elsewhere", "another process works on it", options)
    for cell in tried:
        outcome.failures += _list_failures(options.store.get_record(cell), [cell], options)
    return outcome


def split_packs(cells: Sequence[Cell], options: RunOptions) -> list[list[Cell]]:
    """The packs of a run; several workers of one run get smaller ones where there would be too few."""
    if options.workers == 1 or options.pack != "auto":
        return group_cells_into_packs(cells, options.pack)
    return group_cells_into_packs(cells, min(AUTO_PACK_SIZE, max(1, math.ceil(len(cells) / options.workers))))


def _lock_and_run_pack(group: Sequence[Cell], options: RunOptions) -> list[Cell]:
    """Work on those cells that nobody holds; returns the others."""
    with PackLock(group, options) as claimed:
        _run_pack(claimed.locked_cells, options)
        return claimed.busy_cells


def _wait_and_run_busy_cells(elsewhere: list[list[Cell]], options: RunOptions) -> None:
    """Wait until others have finished these cells, and take over what one of them leaves undone."""
    # What another has just tried in vain is not tried once more.
    options = replace(options, retry_failed=False)
    waiting, said = elsewhere, False
    while waiting := [left for group in waiting if (left := _lock_and_run_pack(group, options))]:
        if not said:
            options.reporter.say(_format_waiting([cell for group in waiting for cell in group]))
        said = True
        time.sleep(POLL_SECONDS)


def _format_waiting(cells: Sequence[Cell]) -> str:
    if len(cells) == 1:
        return f"waiting for another process that works on the cell {cells[0].fingerprint}"
    return f"waiting for other processes that work on {len(cells)} cells"


def _run_pack(cells: Sequence[Cell], options: RunOptions) -> None:
    """Train and judge the cells of a claimed pack."""
    with options.tracker.open_session():
        if cells:
            train_cells(cells, options)
            evaluate_cells(cells, options)
        if options.tracker.tracks_finished_cells:
            for cell in cells:
                options.tracker.start_run(cell, options.store.get_record(cell))


def _report_skipped_cells(cells: Sequence[Cell], status: str, reason: str, options: RunOptions) -> None:
    """Tell a sweep agent's run why its cell was not run here."""
    if options.tracker.tracks_finished_cells:
        with options.tracker.open_session():
            for cell in cells:
                options.tracker.report_skipped(cell, options.store.get_record(cell), status, reason)


def _prepare_references(grid: Grid, options: RunOptions, outcome: RunOutcome) -> dict[str, str]:
    """Build and judge teachers and starts; full fingerprint -> reason for those that could not be built."""
    broken = {}
    for role, model, cells in _iterate_unlocked_first(grid, options):
        try:
            record = artifacts.ensure_artifact(role, model, grid.scale, options)
        except artifacts.ArtifactFailed as error:
            outcome.failures.append(f"{model.task}: {error}; its {len(cells)} cells were not run")
            broken[model.full_fingerprint] = str(error)
            continue
        evaluate_reference(role, model, record, cells, options)
        outcome.failures += _list_failures(record, cells, options)
    return broken


def _iterate_unlocked_first(grid: Grid, options: RunOptions) -> Iterator[Reference]:
    """The reference models; those that another process works on when their turn comes are left to the end."""
    later = []
    for one in list_references(grid.cells):
        if options.store.get_artifact(grid.scale, one.role, one.model).is_locked():
            later.append(one)
        else:
            yield one
    yield from later


def _list_failures(record: Record, cells: Sequence[Cell], options: RunOptions) -> list[str]:
    """A line for a failed training and for each failed evaluation of a record."""
    parts: list[RecordPart] = [record]
    parts += [record.get_evaluation(e) for e in dict.fromkeys(e for c in cells for e in c.evaluations)]
    lines = []
    for part in parts:
        status = part.read_status()
        if status.get("state") == "failed":
            name = part.folder.relative_to(options.outputs)
            lines.append(
                f"{name}: {status.get('error')} (see {part.status_file}; --retry-failed tries again)"
            )
    return lines
