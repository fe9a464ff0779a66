"""Run an experiment from Python: `gkd_lab.run`. It prints nothing unless asked, and ends no process."""

import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gkd_lab import experiments
from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.config.packs import PackLimit, parse_pack_limit
from gkd_lab.experiments import Experiment, load_experiment
from gkd_lab.runner.interrupts import handle_signals
from gkd_lab.store import State, Store
from gkd_lab.store.output_folders import create_outputs_folder
from gkd_lab.tables.failure_causes import RETRY_HINT
from gkd_lab.tables.rows import build_table_rows

TrackerName = Literal["none", "wandb", "trackio"]
_PYTHON_RETRY_HINT = "retry_failed=True tries again"


@dataclass(frozen=True)
class Outcome:
    """What a run has left behind."""

    experiment: Experiment
    states: Mapping[State, int]
    """State (`done`, `failed`, `running`, `missing`) -> number of cells, with their evaluations."""
    failures: tuple[str, ...]
    """A line per failure: the folder or model, the error, and the file with its traceback."""
    busy_cells: int
    """Cells that other processes work on, where `wait=False` left them."""

    @property
    def is_done(self) -> bool:
        """Whether every cell is done and nothing failed."""
        return set(self.states) == {"done"} and not self.failures

    def __repr__(self) -> str:
        """Return a line with the cells by state, then a line per failure."""
        counts = ", ".join(f"{count} {state}" for state, count in self.states.items())
        busy = f"; other processes work on {self.busy_cells}" if self.busy_cells else ""
        first = f"<outcome of {self.experiment.name}: of {len(self.experiment.cells)} cells {counts}{busy}>"
        return "\n".join([first, *(f"failed: {line}" for line in self.failures)])


def run_experiment(
    experiment: Experiment | str | Path,
    *,
    pack: PackLimit = "auto",
    retry_failed: bool = False,
    wait: bool = True,
    progress: bool = False,
    tracker: TrackerName = "none",
    term_gradients: bool = False,
) -> Outcome:
    """Train and evaluate every cell of an experiment that is not done, as `gkd-lab run` does.

    What is done is not done again, and a run that was interrupted goes on from its checkpoints. Ctrl-C (in a
    notebook: Interrupt) saves a checkpoint after the current step and raises KeyboardInterrupt; in another
    thread than the main one, which cannot have signal handlers, it is left to the caller.

    Args:
        experiment: As `gkd_lab.load` returns it, or a name or YAML file for `load`.
        pack: Cells that train as one model: `auto` (as many as fit into memory), `off`, or at most so many.
        retry_failed: Run failed cells again.
        wait: Wait for cells that other processes work on, or leave them.
        progress: Show progress with the time left on standard error.
        tracker: Mirror the records to `wandb` or `trackio`.
        term_gradients: Log the gradient norm of each loss term, `grad_norm/NAME`.

    Returns:
        Cells by state, and the failures. A cell that fails raises nothing: its line names it, its error and
        the file with the traceback.

    Raises:
        ConfigError: (a ValueError) for a request that is wrong, before anything is trained.
        OSError: where a record cannot be written; what was finished is kept.

    Examples:
        >>> outcome = gkd_lab.run(gkd_lab.load("quickstart", steps=20), progress=True)
        >>> assert outcome.is_done, outcome
    """
    if not isinstance(experiment, Experiment):
        experiment = load_experiment(experiment)
    limit = parse_pack_limit(str(pack))
    if tracker not in get_args(TrackerName):
        raise build_unknown_name_error("tracker", tracker, get_args(TrackerName))
    grid, store = experiment.grid, Store(create_outputs_folder(experiment.outputs))
    if not retry_failed and all(row["status"] == "done" for row in build_table_rows(grid, store)):
        return _build_outcome(experiment, store)
    experiments.check_before_run(grid)
    from rich.console import Console

    from gkd_lab.runner.progress import Reporter, silence_libraries
    from gkd_lab.runner.run import run_grid
    from gkd_lab.runner.run_options import RunOptions
    from gkd_lab.runner.trackers import create_tracker

    silence_libraries()
    reporter = Reporter() if progress else Reporter(Console(quiet=True))
    options = RunOptions(
        store.root,
        pack=limit,
        retry_failed=retry_failed,
        reporter=reporter,
        tracker=create_tracker(tracker, grid.name, store.root, reporter),
        busy_cells="wait" if wait else "pass",
        term_gradients=term_gradients,
    )
    is_main_thread = threading.current_thread() is threading.main_thread()
    with handle_signals() if is_main_thread else nullcontext():
        outcome = run_grid(grid, options)
    return _build_outcome(experiment, store, tuple(outcome.failures), outcome.busy_cell_count)


def _build_outcome(
    experiment: Experiment, store: Store, failures: tuple[str, ...] = (), busy_cells: int = 0
) -> Outcome:
    """Return the outcome of a run, with the states that its records have now."""
    rows = build_table_rows(experiment.grid, store)
    counts = Counter[State](row["status"] for row in rows if row["role"] == "cell")
    lines = tuple(line.replace(RETRY_HINT, _PYTHON_RETRY_HINT) for line in failures)
    return Outcome(experiment, dict(counts), lines, busy_cells)
