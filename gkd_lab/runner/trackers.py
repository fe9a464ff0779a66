"""A cell's run at a tracker: config, history, scores and verdict, mirrored from its record as it grows.

The record is the store. A tracker that fails costs one warning and never a cell.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from gkd_lab.config import Cell, Grid
from gkd_lab.runner.progress import Reporter
from gkd_lab.store import Record, Store
from gkd_lab.tables.rows import name_evaluations

TrackerName = Literal["none", "wandb", "trackio"]


class Tracker:
    """`--tracker none`: follows no cell and imports nothing."""

    tracks_finished_cells = False
    """Whether a cell for which nothing is left to do has a run too: a sweep agent's has."""

    @contextmanager
    def open_session(self) -> Iterator[None]:
        """The runs started inside end with this block, each with its record's verdict."""
        yield

    def start_run(self, cell: Cell, record: Record) -> None:
        """Open the cell's run, or go on with it; what its record holds already is sent first."""

    def log_row(self, record: Record, row: Mapping[str, Any]) -> None:
        """A row of the record's history, as it is written."""

    def log_scores(self, record: Record) -> None:
        """New scores are in the record."""

    def finish_run(self, record: Record) -> None:
        """End the record's run with the verdict that the record holds."""

    def report_skipped(self, cell: Cell, record: Record, status: str, reason: str) -> None:
        """The cell was not run by this process; `failed` is a status that counts as a failure."""


class TrackedRun(Protocol):
    """One open run of a tracker's."""

    next_step: int
    """The first step that is not there yet."""
    logged_scores: set[str]
    """Names of scores that are there already."""

    def log(self, row: Mapping[str, Any], step: int) -> None: ...
    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None: ...


OpenRun = Callable[[Cell, dict[str, Any]], TrackedRun]
"""Opens the run of a cell with this config."""


MAX_OPEN_ATTEMPTS = 2
"""Runs in a row that cannot be opened before no more is tried: each may wait for a server's answer."""


class MirrorTracker(Tracker):
    """Runs at a tracker, one for each cell that is worked on."""

    def __init__(
        self, name: str, opens: OpenRun, experiment: str, reporter: Reporter, *, agent: bool
    ) -> None:
        self.name, self.open_run, self.experiment, self.reporter = name, opens, experiment, reporter
        self.tracks_finished_cells = agent
        self._runs: dict[Record, tuple[Cell, TrackedRun]] = {}
        self._failed_in_a_row = 0
        self._has_warned = False

    @contextmanager
    def open_session(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            interrupted = not isinstance(error, Exception)
            for record in list(self._runs):
                if record.read_status():
                    self.finish_run(record)
                else:
                    self._end_run(record, {"status": "interrupted", "error": why}, 1, interrupted=interrupted)
            raise
        for record in list(self._runs):
            self.finish_run(record)

    def start_run(self, cell: Cell, record: Record) -> None:
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
        if record in self._runs:
            _, run = self._runs[record]
            values = {name: value for name, value in row.items() if name != "step"}
            if row["step"] >= run.next_step:
                self._send_values(record, values, row["step"])

    def log_scores(self, record: Record) -> None:
        if record in self._runs:
            cell, run = self._runs[record]
            new = {
                name: v for name, v in collect_scores(cell, record).items() if name not in run.logged_scores
            }
            if new:
                self._send_values(record, new, max(run.next_step, cell.training.steps + 1))
                run.logged_scores.update(new)

    def finish_run(self, record: Record) -> None:
        if record in self._runs:
            cell, _ = self._runs[record]
            verdict = summarize_status(cell, record)
            self._end_run(
                record, {**collect_scores(cell, record), **verdict}, int(verdict["status"] != "done")
            )

    def report_skipped(self, cell: Cell, record: Record, status: str, reason: str) -> None:
        self.start_run(cell, record)
        self._end_run(record, {"status": status, "error": reason}, int(status == "failed"))

    def _send_values(self, record: Record, values: Mapping[str, Any], step: int) -> None:
        _, run = self._runs[record]
        with self._ignore_errors(record):
            run.log(values, step)
            run.next_step = step + 1

    def _end_run(
        self, record: Record, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool = False
    ) -> None:
        if record in self._runs:
            _, run = self._runs.pop(record)
            with self._ignore_errors(record):
                run.end(summary, exit_code, interrupted=interrupted)

    @contextmanager
    def _ignore_errors(self, record: Record) -> Iterator[None]:
        """Whatever a tracker raises ends that run's mirror alone: network, disk, server and library do."""
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
    """What a run is found by: the axis values, names, and the resolved specification."""
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
    """`<evaluation>/<metric>` -> value, for what has been judged; the names are the table's columns."""
    names = name_evaluations(cell.evaluations)
    return {
        f"{names[evaluation.folder]}/{metric}": score["value"]
        for evaluation in cell.evaluations
        for metric, score in record.get_evaluation(evaluation).read_scores().items()
    }


def summarize_status(cell: Cell, record: Record) -> dict[str, Any]:
    """`status` of the cell as a whole, and the last line of the first error."""
    parts = [record, *(record.get_evaluation(evaluation) for evaluation in cell.evaluations)]
    verdicts = [part.read_status() for part in parts]
    for verdict in verdicts:
        if verdict.get("state") == "failed":
            return {"status": "failed", "error": str(verdict.get("error")).strip().splitlines()[-1]}
    return {"status": "done" if all(verdicts) else "missing"}


def replay_records(grid: Grid, store: Store, tracker: Tracker) -> None:
    """Send what finished cells hold: nothing is trained, and torch is not loaded."""
    with tracker.open_session():
        for cell in grid.cells:
            tracker.start_run(cell, store.get_record(cell))


def create_tracker(name: TrackerName, experiment: str, outputs: Path, reporter: Reporter) -> Tracker:
    """The tracker of one invocation. Raises SpecError where its package is missing."""
    if name == "none":
        return Tracker()
    if name == "wandb":
        from gkd_lab.runner.wandb_tracker import WandbClient, is_sweep_agent

        return MirrorTracker(
            name,
            WandbClient(experiment, outputs, reporter).open_run,
            experiment,
            reporter,
            agent=is_sweep_agent(),
        )
    from gkd_lab.runner.trackio_tracker import TrackioClient

    return MirrorTracker(name, TrackioClient(experiment).open_run, experiment, reporter, agent=False)
