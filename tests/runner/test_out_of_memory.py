"""A single cell that runs out of memory takes fewer rows at a time, with the same result."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store
from gkd_lab.training.trainer import GKDTrainer

from .tiny_experiments import options, table_of, tiny_grid


def out_of_memory_above(rows: int, monkeypatch: pytest.MonkeyPatch, from_step: int = 0) -> None:
    """Steps that take more rows at once fail as on a full GPU."""
    step = GKDTrainer.training_step

    def training_step(trainer: GKDTrainer, *args: Any, **more: Any) -> Any:
        if trainer.args.per_device_train_batch_size > rows and trainer.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(trainer, *args, **more)

    monkeypatch.setattr(GKDTrainer, "training_step", training_step)


@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_fewer_rows_at_a_time_give_the_same_cell(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more than one epoch of 42 rows, of which whole batches of 4 leave 2 out."""
    changes: dict[str, Any] = {
        "precision": "fp64",
        "grid": {"lmbda": [0.5]},
        "steps": 12,
        "data": {"train": 42, "validation": 4, "test": 4},
        "evaluations": [{"decoding": "greedy"}],
    }
    grid = tiny_grid(tmp_path, task, **changes)
    assert run_grid(grid, options(tmp_path / "whole")).failures == []
    out_of_memory_above(1, monkeypatch, from_step=3)
    told = io.StringIO()
    assert run_grid(grid, options(tmp_path / "parts", Reporter(Console(file=told, width=500)))).failures == []
    (cell,) = grid.cells
    whole, parts = (Store(tmp_path / name).get_record(cell) for name in ("whole", "parts"))
    said = [line for line in told.getvalue().splitlines() if "out of memory" in line]
    assert [line.partition("out of memory with ")[2] for line in said] == [
        "4 rows at once; going on with 2",
        "2 rows at once; going on with 1",
    ]
    assert parts.read_provenance()["rows_at_once"] == 1
    assert parts.read_provenance()["resumed_at_step"] == 2
    ours, theirs = (load_file(one.checkpoint / "model.safetensors") for one in (whole, parts))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for row, other in zip(whole.read_history(), parts.read_history(), strict=True):
        assert row == pytest.approx(other, rel=1e-9, abs=1e-12)
    assert table_of(grid, tmp_path / "whole") == table_of(grid, tmp_path / "parts")


def test_a_cell_whose_single_rows_do_not_fit_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, evaluations=[{"decoding": "greedy"}])
    out_of_memory_above(0, monkeypatch)
    (line,) = run_grid(grid, options(tmp_path / "outputs")).failures
    assert grid.cells[0].fingerprint in line
    assert "out of memory even with one row at a time (OutOfMemoryError: CUDA out of memory" in line
    assert "take smaller models" in line
