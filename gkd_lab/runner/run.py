"""Run a grid: reference models first, then pack after pack of cells; finished work is not repeated."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gkd_lab.config import Grid
from gkd_lab.config.cell import Cell, Reference, list_references
from gkd_lab.config.packs import AUTO_PACK_SIZE, group_cells_into_packs
from gkd_lab.models.lora_students import check_loaded_targets
from gkd_lab.runner import artifacts
from gkd_lab.runner.cell_locks import PackLock
from gkd_lab.runner.evaluate_cells import evaluate_cells, evaluate_reference
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.tf32 import check_tf32
from gkd_lab.runner.train_cells import train_cells
from gkd_lab.store import Record, RecordPart

POLL_SECONDS = 1.0
"""Seconds between two attempts to lock cells that other processes have locked."""


@dataclass
class RunOutcome:
    """Failures of a run, and how many cells it left to other processes."""

    failures: list[str] = field(default_factory=list)
    """One line per failure, with its error and status file."""
    busy_cell_count: int = 0
    """Number of cells that other processes have locked."""


def run_grid(grid: Grid, options: RunOptions) -> RunOutcome:
    """Build the reference models, train and evaluate every cell; return failure lines and busy cell count.

    Cells that other processes have locked are skipped at first, then waited for or left (`busy_cells`).
    Raises ConfigError for an adapter's target that a loaded student lacks, and for TF32 where there is none.
    """
    check_loaded_targets(cell.training for cell in grid.cells)
    check_tf32(cell.training for cell in grid.cells)
    outcome = RunOutcome()
    failed_references = _prepare_references(grid, options, outcome)
    tried_cells: list[Cell] = []
    busy_packs: list[list[Cell]] = []
    for pack in split_packs(grid.cells, options):
        fingerprints = (model.full_fingerprint for _, model in pack[0].training.reference_models)
        error = next((failed_references[name] for name in fingerprints if name in failed_references), None)
        if error is not None:
            _report_skipped_cells(pack, "failed", error, options)
            continue
        tried_cells += pack
        if busy_cells := _lock_and_run_pack(pack, options):
            busy_packs.append(busy_cells)
    if options.busy_cells == "wait":
        _wait_and_run_busy_cells(busy_packs, options)
    else:
        outcome.busy_cell_count = sum(map(len, busy_packs))
        for pack in busy_packs:
            _report_skipped_cells(pack, "elsewhere", "another process works on it", options)
    for cell in tried_cells:
        outcome.failures += _list_failure_lines(options.store.get_record(cell), [cell], options)
    return outcome


def split_packs(cells: Sequence[Cell], options: RunOptions) -> list[list[Cell]]:
    """Return the cells grouped into packs; with pack auto, small enough that each worker gets one."""
    if options.workers == 1 or options.pack != "auto":
        return group_cells_into_packs(cells, options.pack)
    return group_cells_into_packs(cells, min(AUTO_PACK_SIZE, max(1, math.ceil(len(cells) / options.workers))))


def _lock_and_run_pack(pack: Sequence[Cell], options: RunOptions) -> list[Cell]:
    """Train and evaluate the pack's cells that can be locked; return those that other processes hold."""
    with PackLock(pack, options) as lock:
        _run_pack(lock.locked_cells, options)
        return lock.busy_cells


def _wait_and_run_busy_cells(busy_packs: list[list[Cell]], options: RunOptions) -> None:
    """Try the busy packs again each second until every cell was locked; run what is unfinished.

    Failures stay, even with `--retry-failed`.
    """
    # A failure that another process has just recorded is not retried.
    options = replace(options, retry_failed=False)
    is_first = True
    while busy_packs := [busy for pack in busy_packs if (busy := _lock_and_run_pack(pack, options))]:
        if is_first:
            options.reporter.say(_format_waiting([cell for pack in busy_packs for cell in pack]))
        is_first = False
        time.sleep(POLL_SECONDS)


def _format_waiting(cells: Sequence[Cell]) -> str:
    """Return the waiting message: it names one cell by its fingerprint, or several by their number only."""
    if len(cells) == 1:
        return f"waiting for another process that works on the cell {cells[0].fingerprint}"
    return f"waiting for other processes that work on {len(cells)} cells"


def _run_pack(cells: Sequence[Cell], options: RunOptions) -> None:
    """Train and evaluate cells that the caller has locked, and show them to the tracker; may be none."""
    with options.tracker.open_session():
        if cells:
            train_cells(cells, options)
            evaluate_cells(cells, options)
        if options.tracker.tracks_finished_cells:
            for cell in cells:
                options.tracker.start_run(cell, options.store.get_record(cell))


def _report_skipped_cells(cells: Sequence[Cell], status: str, reason: str, options: RunOptions) -> None:
    """Send status and reason of cells not run by this process to the tracker, only under a sweep agent."""
    if options.tracker.tracks_finished_cells:
        with options.tracker.open_session():
            for cell in cells:
                options.tracker.report_skipped(cell, options.store.get_record(cell), status, reason)


def _prepare_references(grid: Grid, options: RunOptions, outcome: RunOutcome) -> dict[str, str]:
    """Build and evaluate teachers and SFT students; return {full fingerprint: error} of those not built.

    Failures of building and evaluating are also added to `outcome`.
    """
    errors: dict[str, str] = {}
    line_numbers: dict[str, int] = {}  # of failures in `outcome`, by reason
    for role, model, cells in _iterate_references_locked_last(grid, options):
        try:
            record = artifacts.ensure_artifact(role, model, grid.scale, options)
        except artifacts.ArtifactFailed as error:
            record = options.store.get_artifact(grid.scale, role, model)
            reason = str(record.read_status().get("error"))
            if reason in line_numbers:
                outcome.failures[line_numbers[reason]] += (
                    f"; the {role} failed for the same reason (see {record.status_file})"
                )
            else:
                line_numbers[reason] = len(outcome.failures)
                outcome.failures.append(f"{model.task}: {error}; its {len(cells)} cells were not run")
            errors[model.full_fingerprint] = str(error)
            continue
        evaluate_reference(role, model, record, cells, options)
        outcome.failures += _list_failure_lines(record, cells, options)
    return errors


def _iterate_references_locked_last(grid: Grid, options: RunOptions) -> Iterator[Reference]:
    """Yield all reference models of the grid; one that is locked when its turn comes is yielded last."""
    locked_references = []
    for reference in list_references(grid.cells):
        if options.store.get_artifact(grid.scale, reference.role, reference.model).is_locked():
            locked_references.append(reference)
        else:
            yield reference
    yield from locked_references


def _list_failure_lines(record: Record, cells: Sequence[Cell], options: RunOptions) -> list[str]:
    """Return a line (folder, error, status file) per failure: of training and of evaluations of `cells`."""
    evaluations = dict.fromkeys(evaluation for cell in cells for evaluation in cell.evaluations)
    parts: list[RecordPart] = [record, *map(record.get_evaluation, evaluations)]
    statuses = [(part, part.read_status()) for part in parts]
    return [
        f"{part.folder.relative_to(options.outputs)}: {status.get('error')} "
        f"(see {part.status_file}; --retry-failed tries again)"
        for part, status in statuses
        if status.get("state") == "failed"
    ]
