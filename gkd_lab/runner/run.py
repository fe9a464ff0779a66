"""Run a grid: reference models first, then pack after pack of cells; finished work is not repeated."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from gkd_lab.config import Grid
from gkd_lab.config.cell import Cell, Reference, list_references
from gkd_lab.models.lora_students import check_loaded_targets
from gkd_lab.runner import artifacts
from gkd_lab.runner.cell_locks import PackLock
from gkd_lab.runner.evaluate_cells import evaluate_cells, evaluate_reference
from gkd_lab.runner.outcome import (
    RunOutcome,
    format_artifact_failure,
    list_runnable_cells,
)
from gkd_lab.runner.pack_capacity import absorb_kills, forget_attempts, split_packs
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.tf32 import check_tf32
from gkd_lab.runner.train_cells import train_cells
from gkd_lab.store.lock import explain_missing_file_locks
from gkd_lab.tables.failure_causes import format_failures, list_failures

POLL_SECONDS = 1.0
"""Seconds between two attempts to lock cells that other processes have locked."""


def run_grid(grid: Grid, options: RunOptions) -> RunOutcome:
    """Build the reference models, train and evaluate every cell; return the failures, a line for each cause.

    Cells that other processes have locked are skipped at first, then waited for or left (`busy_cells`).
    Raises ConfigError for an adapter's target that a loaded student lacks, and for TF32 where there is none.
    """
    check_cells(grid.cells)
    if options.workers == 1:  # else the parent of the workers has said it
        _report_missing_file_locks(options)
    for reference in _iterate_references_locked_last(grid, options):
        prepare_reference(reference, options)
    busy_packs: list[list[Cell]] = []
    for pack in split_packs(grid.cells, options):
        runnable_cells = list_runnable_cells(pack, options.store)
        _report_cells_of_failed_models(pack, runnable_cells, options)
        if runnable_cells and (busy_cells := _lock_and_run_pack(runnable_cells, options)):
            busy_packs.append(busy_cells)
    busy_cell_count = 0
    if options.busy_cells == "wait":
        _wait_and_run_busy_cells(busy_packs, options)
    else:
        busy_cell_count = sum(map(len, busy_packs))
        for pack in busy_packs:
            _report_skipped_cells(pack, "elsewhere", "another process works on it", options)
    return RunOutcome(format_failures(list_failures(grid, options.store)), busy_cell_count)


def _report_missing_file_locks(options: RunOptions) -> None:
    """Say so if the file system of the outputs folder, which is created, has no file locks."""
    options.outputs.mkdir(parents=True, exist_ok=True)
    note = explain_missing_file_locks(options.outputs)
    if note is not None:
        options.reporter.say(note)


def check_cells(cells: Sequence[Cell]) -> None:
    """Raise ConfigError for an adapter's target that a loaded student lacks, and TF32 where there is none."""
    check_loaded_targets(cell.training for cell in cells)
    check_tf32(cell.training for cell in cells)


def prepare_reference(reference: Reference, options: RunOptions) -> None:
    """Build a teacher or SFT student and run its cells' evaluations; failures are stored in its record."""
    role, model, cells = reference
    with suppress(artifacts.ArtifactFailed):
        record = artifacts.ensure_artifact(role, model, cells[0].scale, options)
        evaluate_reference(role, model, record, cells, options)


def run_pack(cells: Sequence[Cell], options: RunOptions) -> None:
    """Train and evaluate the cells of a pack; those that other processes have locked are waited for."""
    if busy_cells := _lock_and_run_pack(cells, options):
        _wait_and_run_busy_cells([busy_cells], options)


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
            absorb_kills(cells, options)
            train_cells(cells, options)
            evaluate_cells(cells, options)
            forget_attempts(cells, options)
        if options.tracker.tracks_finished_cells:
            for cell in cells:
                options.tracker.start_run(cell, options.store.get_record(cell))


def _report_skipped_cells(cells: Sequence[Cell], status: str, reason: str, options: RunOptions) -> None:
    """Send status and reason of cells not run by this process to the tracker, only under a sweep agent."""
    if options.tracker.tracks_finished_cells:
        with options.tracker.open_session():
            for cell in cells:
                options.tracker.report_skipped(cell, options.store.get_record(cell), status, reason)


def _report_cells_of_failed_models(
    pack: Sequence[Cell], runnable_cells: Sequence[Cell], options: RunOptions
) -> None:
    """Show the tracker the cells of a pack that are not run, with the failure of their reference model."""
    runnable = {cell.full_fingerprint for cell in runnable_cells}
    for cell in pack:
        if cell.full_fingerprint not in runnable:
            records = [
                (role, options.store.get_artifact(cell.scale, role, model))
                for role, model in cell.training.reference_models
            ]
            failures = [
                format_artifact_failure(role, record)
                for role, record in records
                if record.read_status().get("state") == "failed"
            ]
            _report_skipped_cells([cell], "failed", failures[0], options)


def _iterate_references_locked_last(grid: Grid, options: RunOptions) -> Iterator[Reference]:
    """Yield all reference models of the grid; one that is locked when its turn comes is yielded last."""
    locked_references = []
    for reference in list_references(grid.cells):
        if options.store.get_artifact(grid.scale, reference.role, reference.model).is_locked():
            locked_references.append(reference)
        else:
            yield reference
    yield from locked_references
