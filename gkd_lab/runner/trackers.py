"""A cell's run at a tracker: config, history, scores and verdict, mirrored from its record as it grows.

The record is the store. A tracker that fails costs one warning and never a cell.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from gkd_lab.config import Cell, GridOfCells
from gkd_lab.runner.progress import Reporter
from gkd_lab.store import Record, Store
from gkd_lab.tables.rows import evaluation_names

TrackerName = Literal["none", "wandb", "trackio"]


class Tracker:
    """`--tracker none`: follows no cell and imports nothing."""

    follows_done = False
    """Whether a cell for which nothing is left to do has a run too: a sweep agent's has."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """The runs started inside end with this block, each with its record's verdict."""
        yield

    def start(self, cell: Cell, record: Record) -> None:
        """Open the cell's run, or go on with it; what its record holds already is sent first."""

    def log(self, record: Record, row: Mapping[str, Any]) -> None:
        """A row of the record's history, as it is written."""

    def judged(self, record: Record) -> None:
        """New scores are in the record."""

    def settle(self, record: Record) -> None:
        """End the record's run with the verdict that the record holds."""

    def left_out(self, cell: Cell, record: Record, status: str, why: str) -> None:
        """The cell was not run by this process; `failed` is a status that counts as a failure."""


class TrackedRun(Protocol):
    """One open run of a tracker's."""

    step: int
    """The first step that is not there yet."""
    known: set[str]
    """Names of scores that are there already."""

    def log(self, row: Mapping[str, Any], step: int) -> None: ...
    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None: ...


Open = Callable[[Cell, dict[str, Any]], TrackedRun]
"""Opens the run of a cell with this config."""


ATTEMPTS = 2
"""Runs in a row that cannot be opened before no more is tried: each may wait for a server's answer."""


class Mirror(Tracker):
    """Runs at a tracker, one for each cell that is worked on."""

    def __init__(self, name: str, opens: Open, experiment: str, reporter: Reporter, *, agent: bool) -> None:
        self.name, self.opens, self.experiment, self.reporter = name, opens, experiment, reporter
        self.follows_done = agent
        self._runs: dict[Record, tuple[Cell, TrackedRun]] = {}
        self._failed_in_a_row = 0
        self._warned = False

    @contextmanager
    def open(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            interrupted = not isinstance(error, Exception)
            for record in list(self._runs):
                if record.status():
                    self.settle(record)
                else:
                    self._end(record, {"status": "interrupted", "error": why}, 1, interrupted=interrupted)
            raise
        for record in list(self._runs):
            self.settle(record)

    def start(self, cell: Cell, record: Record) -> None:
        if record in self._runs or self._failed_in_a_row >= ATTEMPTS:
            return
        with self._forgiven(record):
            self._failed_in_a_row += 1
            run = self.opens(cell, config_of(cell, self.experiment))
            self._runs[record], self._failed_in_a_row = (cell, run), 0
        for row in record.history():
            self.log(record, row)
        self.judged(record)

    def log(self, record: Record, row: Mapping[str, Any]) -> None:
        if record in self._runs:
            _, run = self._runs[record]
            values = {name: value for name, value in row.items() if name != "step"}
            if row["step"] >= run.step:
                self._send(record, values, row["step"])

    def judged(self, record: Record) -> None:
        if record in self._runs:
            cell, run = self._runs[record]
            new = {name: v for name, v in scores_of(cell, record).items() if name not in run.known}
            if new:
                self._send(record, new, max(run.step, cell.training.steps + 1))
                run.known.update(new)

    def settle(self, record: Record) -> None:
        if record in self._runs:
            cell, _ = self._runs[record]
            verdict = verdict_of(cell, record)
            self._end(record, {**scores_of(cell, record), **verdict}, int(verdict["status"] != "done"))

    def left_out(self, cell: Cell, record: Record, status: str, why: str) -> None:
        self.start(cell, record)
        self._end(record, {"status": status, "error": why}, int(status == "failed"))

    def _send(self, record: Record, values: Mapping[str, Any], step: int) -> None:
        _, run = self._runs[record]
        with self._forgiven(record):
            run.log(values, step)
            run.step = step + 1

    def _end(
        self, record: Record, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool = False
    ) -> None:
        if record in self._runs:
            _, run = self._runs.pop(record)
            with self._forgiven(record):
                run.end(summary, exit_code, interrupted=interrupted)

    @contextmanager
    def _forgiven(self, record: Record) -> Iterator[None]:
        """Whatever a tracker raises ends that run's mirror alone: network, disk, server and library do."""
        try:
            yield
        except Exception as error:
            self._runs.pop(record, None)
            if not self._warned:
                self._warned = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self.reporter.say(
                    f"warning: {self.name} failed ({reason}); cells go on, their records hold everything"
                )


def config_of(cell: Cell, experiment: str) -> dict[str, Any]:
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


def scores_of(cell: Cell, record: Record) -> dict[str, float]:
    """`<evaluation>/<metric>` -> value, for what has been judged; the names are the table's columns."""
    names = evaluation_names(cell.evaluations)
    return {
        f"{names[evaluation.folder]}/{metric}": score["value"]
        for evaluation in cell.evaluations
        for metric, score in record.evaluation(evaluation).scores().items()
    }


def verdict_of(cell: Cell, record: Record) -> dict[str, Any]:
    """`status` of the cell as a whole, and the last line of the first error."""
    parts = [record, *(record.evaluation(evaluation) for evaluation in cell.evaluations)]
    verdicts = [part.status() for part in parts]
    for verdict in verdicts:
        if verdict.get("state") == "failed":
            return {"status": "failed", "error": str(verdict.get("error")).strip().splitlines()[-1]}
    return {"status": "done" if all(verdicts) else "missing"}


def replay(grid: GridOfCells, store: Store, tracker: Tracker) -> None:
    """Send what finished cells hold: nothing is trained, and torch is not loaded."""
    with tracker.open():
        for cell in grid.cells:
            tracker.start(cell, store.of(cell))


def tracker_named(name: TrackerName, experiment: str, outputs: Path, reporter: Reporter) -> Tracker:
    """The tracker of one invocation. Raises SpecError where its package is missing."""
    if name == "none":
        return Tracker()
    if name == "wandb":
        from gkd_lab.runner.wandb_tracker import Wandb, is_agents

        return Mirror(
            name, Wandb(experiment, outputs, reporter).open, experiment, reporter, agent=is_agents()
        )
    from gkd_lab.runner.trackio_tracker import Trackio

    return Mirror(name, Trackio(experiment).open, experiment, reporter, agent=False)
