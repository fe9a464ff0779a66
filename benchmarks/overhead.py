"""Measure the seconds per cell outside of training and decoding, and their share of a run.

    python benchmarks/overhead.py [CELLS | --smoke]

Locks, specification, loading, packing, export, provenance, scoring 8 predictions, status. Teacher and SFT
student are built before the clock starts. Target: under 1 s per cell.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gkd_lab.config import Cell, Grid, RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.experiment import parse_experiment
from gkd_lab.config.packs import PackLimit
from gkd_lab.runner.progress import ProgressUpdate, Reporter, silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.tasks import TASKS

STEPS = 2
TARGET = 1.0


class PhaseClock(Reporter):
    """Silent reporter that sums up the seconds of training and decoding phases."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.seconds = 0.0

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0, **_: Any) -> Iterator[ProgressUpdate]:
        """Add the duration of the block to `seconds`."""
        start = time.perf_counter()
        yield lambda count: None
        self.seconds += time.perf_counter() - start


def build_grid(cells: int, task: str) -> Grid:
    """Return a grid of `cells` cells with tiny models, little data and two steps."""
    sft = {"steps": STEPS, "batch_size": 4}
    models = {
        "teacher": {"layers": 2, "width": 128, "heads": 4, "sft": sft},
        "student": {"layers": 2, "width": 48, "heads": 4, "sft": sft},
    }
    document = {
        "description": "overhead of the harness",
        "task": task,
        "grid": {"beta": [n / cells for n in range(cells)]},
        "data": {"train": 64, "validation": 8, "test": 8},
        "steps": STEPS,
        "batch_size": 4,
        "warmup_steps": 0,
        "cooldown_steps": 0,
        **models,
    }
    revisions = RevisionLookup(
        resolve_data=lambda task, settings: DataSpec(
            kind="made", name="made", revision="1", train=64, validation=8, test=8
        ),
        resolve_model=lambda name: (name, None, "1"),
    )
    return expand_grid("overhead", parse_experiment(document, "overhead"), TASKS, revisions)


def measure(task: str, cells: int, pack: PackLimit) -> tuple[float, float]:
    """Return (all seconds, seconds of training and decoding) of `cells` cells whose artifacts are built."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder)
        grid = build_grid(cells + 1, task)
        first_cell, timed_cells = grid.cells[:1], grid.cells[1:]
        failures = run_grid(
            _replace_cells(grid, first_cell), RunOptions(outputs, reporter=PhaseClock())
        ).failures
        assert not failures, failures
        clock, start = PhaseClock(), time.perf_counter()
        assert not run_grid(
            _replace_cells(grid, timed_cells), RunOptions(outputs, pack=pack, reporter=clock)
        ).failures
        return time.perf_counter() - start, clock.seconds


def _replace_cells(grid: Grid, cells: tuple[Cell, ...]) -> Grid:
    """Return the grid with only these cells."""
    return Grid(grid.name, grid.scale, grid.experiment, grid.axes, cells, {})


def main() -> None:
    """Measure both model families, packed and unpacked, and print the overheads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", type=int, nargs="?", default=8)
    parser.add_argument("--smoke", action="store_true", help="1 cell")
    options = parser.parse_args()
    cells = 1 if options.smoke else options.cells
    silence_libraries()
    torch.manual_seed(0)
    limits: tuple[PackLimit, ...] = ("auto", "off")
    for task in ("arithmetic", "summarization"):
        for pack in limits:
            total, work = measure(task, cells, pack)
            overhead = (total - work) / cells
            print(
                f"{task}, pack {pack}: {overhead:.3f} s a cell outside of training and decoding, "
                f"{overhead / TARGET:.2f} x the target, {(total - work) / total:.0%} of a run of "
                f"{cells} cells x {STEPS} steps ({total:.1f} s)"
            )


if __name__ == "__main__":
    main()
