"""What the tests of trackers share: cells with records written by hand, and a wandb that meets our server."""

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
def wandb_meeting(server: Server, folder: Path, patch: pytest.MonkeyPatch, **more: str) -> Iterator[None]:
    """wandb in this process, as it is in one that starts with the server's environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    kept = {name: value for name, value in server.environment(folder).items() if name.startswith("WANDB_")}
    for name, value in {**kept, **more}.items():
        patch.setenv(name, value)
    patch.setenv("NETRC", str(folder / "netrc"))
    folder.mkdir(exist_ok=True)
    wandb.teardown()
    try:
        yield
    finally:
        wandb.teardown()


def two_cells(outputs: Path) -> list[tuple[Cell, Record]]:
    """Cells of the quickstart, and their records, which are empty."""
    cells = experiments.load("quickstart", outputs=outputs).cells[:2]
    return [(cell, Store(outputs).get_record(cell)) for cell in cells]


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step}


def write_rows(record: Record, *steps: int) -> None:
    record.folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        record.log_row(row(step))


def finish(cell: Cell, record: Record) -> None:
    """As if it had been trained and judged."""
    record.finish(steps=cell.training.steps)
    judge(cell, record)


def judge(cell: Cell, record: Record) -> None:
    for evaluation in cell.evaluations:
        record.get_evaluation(evaluation).write_results(evaluation, [], SCORES)


def follower(outputs: Path, name: Any = "wandb") -> tuple[Tracker, io.StringIO]:
    """A tracker, and what is said."""
    said = io.StringIO()
    reporter = Reporter(Console(file=said, width=500))
    return create_tracker(name, "quickstart", outputs, reporter), said
