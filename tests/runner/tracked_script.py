"""Helpers of the tracker tests: cells with written records, and wandb connected to the test server."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb
from rich.console import Console

from gkd_lab import experiments
from gkd_lab.config import Cell
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.trackers import Tracker, create_tracker
from gkd_lab.store import Record, Store

from ..wandb_server import Server

SCORES = {"accuracy": {"value": 0.25, "low": 0.1, "high": 0.4}}


@contextmanager
def connect_wandb(
    server: Server, folder: Path, patch: pytest.MonkeyPatch, **variables: str
) -> Iterator[None]:
    """Connect wandb in this process to the test server, by the environment variables of a new process."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    wandb_variables = {
        name: value for name, value in server.environment(folder).items() if name.startswith("WANDB_")
    }
    for name, value in {**wandb_variables, **variables}.items():
        patch.setenv(name, value)
    patch.setenv("NETRC", str(folder / "netrc"))
    folder.mkdir(exist_ok=True)
    wandb.teardown()
    try:
        yield
    finally:
        wandb.teardown()


def create_two_cells(outputs: Path) -> list[tuple[Cell, Record]]:
    """Return two cells of the quickstart with their empty records."""
    cells = experiments.load("quickstart", outputs=outputs).cells[:2]
    return [(cell, Store(outputs).get_record(cell)) for cell in cells]


def build_row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step}


def write_rows(record: Record, *steps: int) -> None:
    record.folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        record.log_row(build_row(step))


def finish_record(cell: Cell, record: Record) -> None:
    """Finish a record with scores, as a training and evaluation do."""
    record.finish(steps=cell.training.steps)
    write_scores(cell, record)


def write_scores(cell: Cell, record: Record) -> None:
    for evaluation in cell.evaluations:
        record.get_evaluation(evaluation).write_results(evaluation, [], SCORES)


def create_recorded_tracker(outputs: Path, name: Any = "wandb") -> tuple[Tracker, io.StringIO]:
    """Return a tracker and the text that it prints."""
    output = io.StringIO()
    reporter = Reporter(Console(file=output, width=500))
    return create_tracker(name, "quickstart", outputs, reporter), output
