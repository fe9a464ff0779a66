"""Run a grid on this machine, in this process or in several; replay what is done to a sweep agent."""

import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import typer

from gkd_lab import experiments
from gkd_lab.cli.exit_status import SIGNAL_EXIT_BASE, exit_with_message
from gkd_lab.cli.options import BusyCellAction, TrackerChoice
from gkd_lab.config import Grid
from gkd_lab.config.packs import PackLimit
from gkd_lab.runner.interrupts import handle_signals
from gkd_lab.status.render import render_all_done
from gkd_lab.store import Store
from gkd_lab.store.bfloat16 import list_bfloat16_notes
from gkd_lab.store.lock import explain_missing_file_locks
from gkd_lab.store.machine import write_import_seconds
from gkd_lab.store.output_folders import create_outputs_folder


@handle_signals()
def run_in_process(
    grid: Grid,
    outputs: Path,
    limit: PackLimit,
    retry_failed: bool,
    tracker: TrackerChoice,
    *,
    busy_cells: BusyCellAction,
    workers: int = 1,
    workers_on_gpu: int = 1,
    term_gradients: bool = False,
) -> None:
    """Train and evaluate a grid's unfinished cells in this process; exit 1 if some failed or are busy.

    For a sweep agent a busy cell is no failure. workers: Number of processes that share this run.
    workers_on_gpu: Those of them that share this process's GPU.
    """
    store = Store(create_outputs_folder(outputs))
    if not retry_failed and _is_grid_done(grid, store):
        if tracker == "wandb" and is_sweep_agent():
            _replay_to_sweep_agent(grid, store)
        print(render_all_done(grid.name, len(grid.cells)), file=sys.stderr)
        return
    experiments.check_before_run(grid)
    if workers == 1:  # else the parent of the workers has said it
        _print_work_ahead(grid, store, limit)
    started = time.monotonic()
    from gkd_lab.runner.progress import Reporter, silence_libraries
    from gkd_lab.runner.run import run_grid
    from gkd_lab.runner.run_options import RunOptions
    from gkd_lab.runner.trackers import create_tracker

    reporter = Reporter()
    options = RunOptions(
        outputs,
        pack=limit,
        retry_failed=retry_failed,
        reporter=reporter,
        tracker=create_tracker(tracker, grid.name, outputs, reporter),
        busy_cells=busy_cells,
        workers=workers,
        workers_on_gpu=workers_on_gpu,
        term_gradients=term_gradients,
    )
    silence_libraries()
    if workers == 1:
        write_import_seconds(outputs, time.monotonic() - started)
    gc.freeze()  # the collections between trainings skip the objects of the libraries
    try:
        outcome = run_grid(grid, options)
    except OSError as error:
        exit_with_message(f"{error}; what was finished is kept, run again to go on", 1)
    for line in outcome.failures:
        print(f"failed: {line}", file=sys.stderr)
    if outcome.busy_cell_count:
        print(f"{outcome.busy_cell_count} cells are being run by another process", file=sys.stderr)
    # For a sweep agent a busy cell is no failure: three failures would stop the agent.
    if outcome.failures or (outcome.busy_cell_count and not is_sweep_agent()):
        raise typer.Exit(1)
    if outcome.busy_cell_count or workers > 1:
        return
    print(render_all_done(grid.name, len(grid.cells)), file=sys.stderr)


def run_in_workers(
    grid: Grid, outputs: Path, count: int, arguments: Sequence[str], retry_failed: bool
) -> None:
    """Run a grid in `count` child processes; exit with their status unless all cells are done.

    arguments: Command line of each child. retry_failed: Delete stored failures first.
    """
    from gkd_lab.runner.devices import list_gpus
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.workers import FAILURE_PREFIX, WorkerPool, clear_failures
    from gkd_lab.tables.failure_causes import format_failures, list_failures

    store = Store(create_outputs_folder(outputs))
    if note := explain_missing_file_locks(store.root):
        print(note, file=sys.stderr)
    if retry_failed:
        clear_failures(grid, store)
    if not _is_grid_done(grid, store):
        experiments.check_before_run(grid)
        _print_work_ahead(grid, store, "auto")
        if any(cell.training.tf32 for cell in grid.cells):
            from gkd_lab.runner.tf32 import check_tf32

            check_tf32(cell.training for cell in grid.cells)  # once, instead of in each worker
        reporter, gpus = Reporter(), list_gpus()
        if gpus:
            reporter.say(f"{count} workers on GPU{'s' if len(gpus) > 1 else ''} {', '.join(gpus)}")
        pool = WorkerPool(count, [sys.executable, "-m", "gkd_lab", *arguments], reporter.say, gpus)
        status = pool.wait()
        if pool.failures:  # each worker's lines name its own cells
            for line in format_failures(list_failures(grid, store)):
                print(f"{FAILURE_PREFIX}{line}", file=sys.stderr)
        if status == SIGNAL_EXIT_BASE + signal.SIGINT:
            raise KeyboardInterrupt
        if status > SIGNAL_EXIT_BASE:
            raise SystemExit(status)
        # The other workers finish the cells of a killed one.
        if status and not _is_grid_done(grid, store):
            raise typer.Exit(status)
    print(render_all_done(grid.name, len(grid.cells)), file=sys.stderr)


def _print_work_ahead(grid: Grid, store: Store, limit: PackLimit) -> None:
    """Print how much of a grid is to be done, and that the libraries are being loaded, to standard error."""
    from gkd_lab.status.overview import build_overview
    from gkd_lab.status.render import render_state_counts

    overview = build_overview(grid, store, limit)
    print(f"{grid.name}: {render_state_counts(overview)}", file=sys.stderr)
    print(f"{grid.name}: loading torch and the libraries", file=sys.stderr, flush=True)


def _replay_to_sweep_agent(grid: Grid, store: Store) -> None:
    """Log the stored metrics of a grid's finished cells into the wandb agent's run; train nothing."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.trackers import create_tracker, replay_records

    reporter = Reporter()
    replay_records(grid, store, create_tracker("wandb", grid.name, store.root, reporter))


def choose_tracker(choice: TrackerChoice | None) -> TrackerChoice:
    """Return the chosen tracker; without a choice `wandb` under a sweep agent, else `none`."""
    return choice or ("wandb" if is_sweep_agent() else "none")


def is_sweep_agent() -> bool:
    """Return whether a wandb sweep agent started this process: WANDB_SWEEP_ID is set."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _is_grid_done(grid: Grid, store: Store) -> bool:
    """Return whether all cells, with their evaluations, and all reference models are done."""
    from gkd_lab.tables.rows import build_table_rows

    return all(row["status"] == "done" for row in build_table_rows(grid, store))


def print_bfloat16_notes(grid: Grid) -> None:
    """Print notes on cells whose bf16 this machine computes slowly, to standard error."""
    for note in list_bfloat16_notes(grid.cells):
        print(note, file=sys.stderr)
