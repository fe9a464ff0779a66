"""`run` and `cell` at work: in this process or in several, under a sweep agent or alone."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import typer

from gkd_lab import experiments
from gkd_lab.cli.options import TrackerChoice, create_outputs_folder, exit_with_message
from gkd_lab.config import Grid
from gkd_lab.config.packs import PackLimit
from gkd_lab.store import Store


def run_cells(
    grid: Grid,
    outputs: Path,
    limit: PackLimit,
    retry_failed: bool,
    tracker: Literal["none", "wandb", "trackio"],
    held: Literal["pass", "wait"] = "pass",
    *,
    workers: int = 1,
    term_gradients: bool = False,
) -> None:
    """Run a grid in this process, which may be one of several `workers` of the same run."""
    from gkd_lab.runner.interrupts import handle_signals

    with handle_signals():
        _run_grid(grid, outputs, limit, retry_failed, tracker, held, workers, term_gradients)


def _run_grid(
    grid: Grid,
    outputs: Path,
    limit: PackLimit,
    retry_failed: bool,
    tracker: Literal["none", "wandb", "trackio"],
    held: Literal["pass", "wait"],
    workers: int,
    term_gradients: bool,
) -> None:
    store = Store(create_outputs_folder(outputs))
    if not retry_failed and _is_grid_done(grid, store):
        if tracker == "wandb" and is_sweep_agent():
            _replay_to_sweep_agent(grid, store)
        print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)
        return
    experiments.check_generators_and_rewards(grid)
    from gkd_lab.runner.library_logging import silence_libraries
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.run import run_grid as run_grid
    from gkd_lab.runner.run_options import RunOptions
    from gkd_lab.runner.trackers import create_tracker

    reporter = Reporter()
    followed = create_tracker(tracker, grid.name, outputs, reporter)
    options = RunOptions(
        outputs,
        pack=limit,
        retry_failed=retry_failed,
        reporter=reporter,
        tracker=followed,
        busy_cells=held,
        workers=workers,
        term_gradients=term_gradients,
    )
    silence_libraries()
    try:
        outcome = run_grid(grid, options)
    except OSError as error:
        exit_with_message(f"{error}; what was finished is kept, run again to go on", 1)
    for line in outcome.failures:
        print(f"failed: {line}", file=sys.stderr)
    if outcome.busy_cell_count:
        print(f"{outcome.busy_cell_count} cells are being run by another process", file=sys.stderr)
    # A cell that an agent passes over is no failure of its own: three of these would stop the agent.
    if outcome.failures or (outcome.busy_cell_count and not is_sweep_agent()):
        raise typer.Exit(1)
    if outcome.busy_cell_count or workers > 1:
        return
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def run_workers(grid: Grid, outputs: Path, count: int, arguments: Sequence[str], retry_failed: bool) -> None:
    """Run a grid in `count` processes, each started with `words`; exits unless all is done."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.workers import WorkerPool as Processes
    from gkd_lab.runner.workers import clear_failures

    store = Store(create_outputs_folder(outputs))
    if retry_failed:
        clear_failures(grid, store)
    if not _is_grid_done(grid, store):
        experiments.check_generators_and_rewards(grid)
        processes = Processes(count, [sys.executable, "-m", "gkd_lab", *arguments], Reporter().say)
        status = processes.wait()
        for line in processes.failures:
            print(line, file=sys.stderr)
        if status == SIGNAL_EXIT_BASE + signal.SIGINT:
            raise KeyboardInterrupt
        if status > SIGNAL_EXIT_BASE:
            raise SystemExit(status)
        # What a killed worker left undone, the others did.
        if status and not _is_grid_done(grid, store):
            raise typer.Exit(status)
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def _replay_to_sweep_agent(grid: Grid, store: Store) -> None:
    """Into the agent's run; torch is not loaded."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.trackers import create_tracker, replay_records

    reporter = Reporter()
    replay_records(grid, store, create_tracker("wandb", grid.name, store.root, reporter))


def choose_tracker(choice: TrackerChoice | None) -> Literal["none", "wandb", "trackio"]:
    """Of `--tracker`; under a sweep agent wandb where nothing is said."""
    if choice is not None:
        return choice.value
    return "wandb" if is_sweep_agent() else "none"


def is_sweep_agent() -> bool:
    """Whether a wandb sweep agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _is_grid_done(grid: Grid, store: Store) -> bool:
    from gkd_lab.tables.rows import build_table_rows

    return all(row["status"] == "done" for row in build_table_rows(grid, store))


SIGNAL_EXIT_BASE = 128
"""Exit statuses from here on: 128 and the number of the signal that stopped the work."""
