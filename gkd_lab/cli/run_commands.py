"""`run` and `cell` at work: in this process or in several, under a sweep agent or alone."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import typer

from gkd_lab import experiments
from gkd_lab.cli.options import TrackerChoice, leave, writable
from gkd_lab.config import GridOfCells
from gkd_lab.config.packs import PackLimit
from gkd_lab.store import Store


def run_cells(
    grid: GridOfCells,
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
    from gkd_lab.runner.interrupts import signals_heard

    with signals_heard():
        _run_here(grid, outputs, limit, retry_failed, tracker, held, workers, term_gradients)


def _run_here(
    grid: GridOfCells,
    outputs: Path,
    limit: PackLimit,
    retry_failed: bool,
    tracker: Literal["none", "wandb", "trackio"],
    held: Literal["pass", "wait"],
    workers: int,
    term_gradients: bool,
) -> None:
    store = Store(writable(outputs))
    if not retry_failed and _all_done(grid, store):
        if tracker == "wandb" and is_agents():
            _replay(grid, store)
        print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)
        return
    experiments.check_sources(grid)
    from gkd_lab.runner.library_logging import quieten
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.run import run as run_grid
    from gkd_lab.runner.run_options import RunOptions
    from gkd_lab.runner.trackers import tracker_named

    reporter = Reporter()
    followed = tracker_named(tracker, grid.name, outputs, reporter)
    options = RunOptions(
        outputs,
        pack=limit,
        retry_failed=retry_failed,
        reporter=reporter,
        tracker=followed,
        held=held,
        workers=workers,
        term_gradients=term_gradients,
    )
    quieten()
    try:
        outcome = run_grid(grid, options)
    except OSError as error:
        leave(f"{error}; what was finished is kept, run again to go on", 1)
    for line in outcome.failed:
        print(f"failed: {line}", file=sys.stderr)
    if outcome.elsewhere:
        print(f"{outcome.elsewhere} cells are being run by another process", file=sys.stderr)
    # A cell that an agent passes over is no failure of its own: three of these would stop the agent.
    if outcome.failed or (outcome.elsewhere and not is_agents()):
        raise typer.Exit(1)
    if outcome.elsewhere or workers > 1:
        return
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def run_workers(
    grid: GridOfCells, outputs: Path, count: int, words: Sequence[str], retry_failed: bool
) -> None:
    """Run a grid in `count` processes, each started with `words`; exits unless all is done."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.workers import Workers as Processes
    from gkd_lab.runner.workers import forget_failures

    store = Store(writable(outputs))
    if retry_failed:
        forget_failures(grid, store)
    if not _all_done(grid, store):
        experiments.check_sources(grid)
        processes = Processes(count, [sys.executable, "-m", "gkd_lab", *words], Reporter().say)
        status = processes.wait()
        for line in processes.failed:
            print(line, file=sys.stderr)
        if status == SIGNALLED + signal.SIGINT:
            raise KeyboardInterrupt
        if status > SIGNALLED:
            raise SystemExit(status)
        # What a killed worker left undone, the others did.
        if status and not _all_done(grid, store):
            raise typer.Exit(status)
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def _replay(grid: GridOfCells, store: Store) -> None:
    """Into the agent's run; torch is not loaded."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.trackers import replay, tracker_named

    reporter = Reporter()
    replay(grid, store, tracker_named("wandb", grid.name, store.root, reporter))


def tracker_asked(asked: TrackerChoice | None) -> Literal["none", "wandb", "trackio"]:
    """Of `--tracker`; under a sweep agent wandb where nothing is said."""
    if asked is not None:
        return asked.value
    return "wandb" if is_agents() else "none"


def is_agents() -> bool:
    """Whether a wandb sweep agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _all_done(grid: GridOfCells, store: Store) -> bool:
    from gkd_lab.tables.rows import rows

    return all(row["status"] == "done" for row in rows(grid, store))


SIGNALLED = 128
"""Exit statuses from here on: 128 and the number of the signal that stopped the work."""
