"""Mirror the records of cells to a tracker (wandb, trackio): config, history, scores and status.

The record is the source of truth. A tracker that fails causes one warning and never fails a cell.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from gkd_lab.config import Cell, Grid
from gkd_lab.runner.progress import Reporter
from gkd_lab.store import Record, Store
from gkd_lab.store.cell_state import compute_cell_state, get_error_line
from gkd_lab.tables.results import name_evaluations

TrackerName = Literal["none", "wandb", "trackio"]


class Tracker:
    """Tracker of `--tracker none`: tracks no cell and imports no library."""

    tracks_finished_cells = False
    """Whether a finished cell also gets a run, as under a sweep agent."""

    @contextmanager
    def open_session(self) -> Iterator[None]:
        """Yield and do nothing; a subclass closes the runs started in the block, by their records' status."""
        yield

    def start_run(self, cell: Cell, record: Record) -> None:
        """Do nothing; a subclass opens or resumes the cell's run and sends what its record holds."""

    def log_row(self, record: Record, row: Mapping[str, Any]) -> None:
        """Do nothing; a subclass sends a row of the record's history."""

    def log_scores(self, record: Record) -> None:
        """Do nothing; a subclass sends the record's scores that were not sent before."""

    def finish_run(self, record: Record) -> None:
        """Do nothing; a subclass closes the record's run with the status that the record holds."""

    def report_skipped(self, cell: Cell, record: Record, status: str, reason: str) -> None:
        """Do nothing; a subclass sends why this process did not run the cell.

        The status `failed` counts as a failure.
        """


class TrackedRun(Protocol):
    """Interface of one open run at a tracker."""

    next_step: int
    """First step that was not sent yet."""
    logged_scores: set[str]
    """Names of the scores that were sent already."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send a row of values at a step."""

    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None:
        """Send the summary and close the run."""


OpenRun = Callable[[Cell, dict[str, Any]], TrackedRun]
"""Function that opens the run of a cell with a config."""


MAX_OPEN_ATTEMPTS = 2
"""Failed attempts to open a run in a row, after which none is opened: each may wait for a server."""


class MirrorTracker(Tracker):
    """Tracker that mirrors each cell that is worked on to a run of its own."""

    def __init__(
        self, name: str, open_run: OpenRun, experiment: str, reporter: Reporter, *, has_agent: bool
    ) -> None:
        self.name, self.open_run, self.experiment, self.reporter = name, open_run, experiment, reporter
        self.tracks_finished_cells = has_agent
        self._runs: dict[Record, tuple[Cell, TrackedRun]] = {}
        self._failed_in_a_row = 0
        self._has_warned = False

    @contextmanager
    def open_session(self) -> Iterator[None]:
        """Close all open runs after the block, by record status; on an error, unfinished as interrupted."""
        try:
            yield
        except BaseException as error:
            summary = {"status": "interrupted", "error": f"{type(error).__name__}: {error}"}
            is_interrupt = not isinstance(error, Exception)
            for record in list(self._runs):
                if record.read_status():
                    self.finish_run(record)
                else:
                    self._end_run(record, summary, 1, interrupted=is_interrupt)
            raise
        for record in list(self._runs):
            self.finish_run(record)

    def start_run(self, cell: Cell, record: Record) -> None:
        """Open or resume the cell's run, send its history and scores; nothing after two failures in a row."""
        if record in self._runs or self._failed_in_a_row >= MAX_OPEN_ATTEMPTS:
            return
        with self._ignore_errors(record):
            self._failed_in_a_row += 1
            run = self.open_run(cell, build_run_config(cell, self.experiment))
            self._runs[record], self._failed_in_a_row = (cell, run), 0
        for row in record.read_history():
            self.log_row(record, row)
        self.log_scores(record)

    def log_row(self, record: Record, row: Mapping[str, Any]) -> None:
        """Send a history row at its `step` if that was not sent before; nothing if no run is open."""
        if record in self._runs:
            _, run = self._runs[record]
            values = {name: value for name, value in row.items() if name != "step"}
            if row["step"] >= run.next_step:
                self._send_values(record, values, row["step"])

    def log_scores(self, record: Record) -> None:
        """Send scores that the run lacks, at a step after the training's last; nothing if no run is open."""
        if record in self._runs:
            cell, run = self._runs[record]
            scores = collect_scores(cell, record)
            new_scores = {name: scores[name] for name in scores if name not in run.logged_scores}
            if new_scores:
                self._send_values(record, new_scores, max(run.next_step, cell.training.steps + 1))
                run.logged_scores.update(new_scores)

    def finish_run(self, record: Record) -> None:
        """Close the record's open run, if any, with scores and status; exit code 0 if all is done, else 1."""
        if record in self._runs:
            cell, _ = self._runs[record]
            status = summarize_status(cell, record)
            self._end_run(record, {**collect_scores(cell, record), **status}, int(status["status"] != "done"))

    def report_skipped(self, cell: Cell, record: Record, status: str, reason: str) -> None:
        """Open the cell's run and close it with this status and reason; exit code 1 only for `failed`."""
        self.start_run(cell, record)
        self._end_run(record, {"status": status, "error": reason}, int(status == "failed"))

    def _send_values(self, record: Record, values: Mapping[str, Any], step: int) -> None:
        """Send values at `step` to the record's open run, and set its next step to `step` + 1."""
        _, run = self._runs[record]
        with self._ignore_errors(record):
            run.log(values, step)
            run.next_step = step + 1

    def _end_run(
        self, record: Record, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool = False
    ) -> None:
        """Close and forget the record's run, if it has one, sending a summary and an exit code."""
        if record in self._runs:
            _, run = self._runs.pop(record)
            with self._ignore_errors(record):
                run.end(summary, exit_code, interrupted=interrupted)

    @contextmanager
    def _ignore_errors(self, record: Record) -> Iterator[None]:
        """Swallow an error in the block: forget the record's run, and print a warning, once per tracker."""
        try:
            yield
        except Exception as error:
            self._runs.pop(record, None)
            if not self._has_warned:
                self._has_warned = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self.reporter.say(
                    f"warning: {self.name} failed ({reason}); cells go on, their records hold everything"
                )


def build_run_config(cell: Cell, experiment: str) -> dict[str, Any]:
    """Return a run's config: axis values, experiment, scale, fingerprints, training and evaluation specs."""
    return {
        **cell.labels,
        "experiment": experiment,
        "scale": cell.scale,
        "cell": cell.fingerprint,
        "fingerprint": cell.full_fingerprint,
        "spec": cell.training.model_dump(mode="json"),
        "evaluations": [evaluation.model_dump(mode="json") for evaluation in cell.evaluations],
    }


def collect_scores(cell: Cell, record: Record) -> dict[str, float]:
    """Return {`EVALUATION/METRIC`: value} of the cell's stored scores, named as the table's columns."""
    names = name_evaluations(cell.evaluations)
    return {
        f"{names[evaluation.folder]}/{metric}": score["value"]
        for evaluation in cell.evaluations
        for metric, score in record.get_evaluation(evaluation).read_scores().items()
    }


def summarize_status(cell: Cell, record: Record) -> dict[str, Any]:
    """Return a dict: `status`, worst of training and evaluations; `error`, the first failure's last line.

    The error is that of the first failed part. What is unfinished counts as missing, because this process
    holds the cell's lock.
    """
    statuses = [record.read_status(), *(record.get_evaluation(e).read_status() for e in cell.evaluations)]
    training, *evaluations = (status.get("state") for status in statuses)
    state = compute_cell_state(training, evaluations, is_locked=lambda: False).whole
    error = next(filter(None, map(get_error_line, statuses)), None)
    return {"status": state} if error is None else {"status": state, "error": error}


def replay_records(grid: Grid, store: Store, tracker: Tracker) -> None:
    """Send the stored history, scores and status of each cell of the grid to a tracker run of its own.

    Nothing is trained, and torch is not loaded.
    """
    with tracker.open_session():
        for cell in grid.cells:
            tracker.start_run(cell, store.get_record(cell))


def create_tracker(name: TrackerName, experiment: str, outputs: Path, reporter: Reporter) -> Tracker:
    """Return a tracker of wandb or trackio, or for `none` one that does nothing.

    Raises ConfigError where trackio is requested but not installed.
    """
    if name == "none":
        return Tracker()
    if name == "wandb":
        from gkd_lab.runner.wandb_tracker import WandbClient, is_sweep_agent

        return MirrorTracker(
            name,
            WandbClient(experiment, outputs, reporter).open_run,
            experiment,
            reporter,
            has_agent=is_sweep_agent(),
        )
    from gkd_lab.runner.trackio_tracker import TrackioClient

    return MirrorTracker(name, TrackioClient(experiment).open_run, experiment, reporter, has_agent=False)
