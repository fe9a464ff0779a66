"""Tiny experiments that run in seconds, and functions that read a finished outputs folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import Trainer

from gkd_lab import GKDTrainer, experiments
from gkd_lab.config import Grid
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import Store
from gkd_lab.tables.table import build_wide_table, encode_table

TIMED = ("status.json", "provenance.json", "digests.json", "times.jsonl", "files.json")
"""Files with times and machines, which differ between two equal runs."""


def tiny_grid(folder: Path, task: str, name: str = "tiny", **changes: Any) -> Grid:
    """Return lmbda {0, 0.5, 1} x beta {0, 0.5}: 6 cells of 4 steps; `changes` replace fields of the file."""
    document: dict[str, Any] = {
        "description": "a grid small enough for a test",
        "task": task,
        "grid": {"lmbda": [0, 0.5, 1], "beta": [0, 0.5]},
        "teacher": {"layers": 1, "width": 16, "heads": 2, "sft": {"steps": 4}},
        "student": {"layers": 1, "width": 8, "heads": 2, "sft": {"steps": 4}},
        "data": {"train": 40, "validation": 8, "test": 8},
        "steps": 4,
        "batch_size": 4,
        "warmup_steps": 1,
        "cooldown_steps": 1,
        "max_input_tokens": 24,
        "max_output_tokens": 10,
        "evaluations": [
            {"decoding": "greedy"},
            {"decoding": "sample", "temperature": 0.5, "examples": 5},
        ],
    }
    for axis in changes.get("grid") or {}:  # crosses a field, which is then not fixed
        section, _, field = axis.rpartition(".")
        (document.get(section, {}) if section else document).pop(field, None)
    path = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**document, **changes}, sort_keys=False))
    return experiments.load(str(path), outputs=folder / "outputs")


def options(outputs: Path, reporter: Reporter | None = None, **changes: Any) -> RunOptions:
    """Return silent options with checkpoints and log rows every two steps."""
    quiet = Reporter(Console(quiet=True))
    return RunOptions(outputs, checkpoint_every=2, log_every=2, reporter=reporter or quiet, **changes)


@contextmanager
def interrupted_at(
    step: int, monkeypatch: pytest.MonkeyPatch, trainer_class: type[Trainer] = GKDTrainer
) -> Iterator[None]:
    """Interrupt a training inside this block by Ctrl-C before a step."""
    training_step = trainer_class.training_step

    def interrupt_or_step(trainer: Trainer, *args: Any, **keywords: Any) -> Any:
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_class, "training_step", interrupt_or_step)
        yield


def contents(outputs: Path) -> dict[str, bytes]:
    """Return relative name -> bytes of every file that two equal runs must share."""
    return {
        str(path.relative_to(outputs)): path.read_bytes()
        for path in sorted(outputs.rglob("*"))
        if path.is_file() and path.name not in TIMED and not path.name.endswith((".lock", ".part"))
    }


def times(outputs: Path) -> dict[str, int]:
    """Return relative name -> time of last change of every file."""
    return {
        str(path.relative_to(outputs)): path.stat().st_mtime_ns
        for path in sorted(outputs.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def table_of(grid: Grid, outputs: Path) -> list[dict[str, Any]]:
    """Return the rows of `gkd-lab table --format json`."""
    rows: list[dict[str, Any]] = json.loads(encode_table(build_wide_table(grid, Store(outputs)), "json"))
    return rows
