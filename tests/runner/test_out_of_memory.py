"""A single cell that runs out of memory trains in micro-batches, with the same result."""

import io
import re
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


def fail_batches_larger_than(rows: int, monkeypatch: pytest.MonkeyPatch, from_step: int = 0) -> None:
    """Let training steps with more rows run out of memory."""
    step = GKDTrainer.training_step

    def training_step(trainer: GKDTrainer, *args: Any, **keywords: Any) -> Any:
        if trainer.args.per_device_train_batch_size > rows and trainer.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(trainer, *args, **keywords)

    monkeypatch.setattr(GKDTrainer, "training_step", training_step)


@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_micro_batches_give_the_same_result(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more than one epoch of 42 rows, the last 2 of which fill no batch of 4."""
    changes: dict[str, Any] = {
        "precision": "fp64",
        "grid": {"lmbda": [0.5]},
        "steps": 12,
        "data": {"train": 42, "validation": 4, "test": 4},
        "evaluations": [{"decoding": "greedy"}],
    }
    grid = tiny_grid(tmp_path, task, **changes)
    assert run_grid(grid, options(tmp_path / "whole")).failures == []
    fail_batches_larger_than(1, monkeypatch, from_step=3)
    output = io.StringIO()
    assert (
        run_grid(grid, options(tmp_path / "parts", Reporter(Console(file=output, width=500)))).failures == []
    )
    (cell,) = grid.cells
    whole, parts = (Store(tmp_path / name).get_record(cell) for name in ("whole", "parts"))
    messages = [line for line in output.getvalue().splitlines() if "out of memory" in line]
    assert [re.findall(r"\d+", line.partition("out of memory")[2]) for line in messages] == [
        ["4", "2"],
        ["2", "1"],
    ]
    assert parts.read_provenance()["rows_at_once"] == 1
    assert parts.read_provenance()["resumed_at_step"] == 2
    weights, split_weights = (load_file(record.checkpoint / "model.safetensors") for record in (whole, parts))
    torch.testing.assert_close(weights, split_weights, rtol=0, atol=1e-9)
    for row, split_row in zip(whole.read_history(), parts.read_history(), strict=True):
        assert row == pytest.approx(split_row, rel=1e-9, abs=1e-12)
    assert table_of(grid, tmp_path / "whole") == table_of(grid, tmp_path / "parts")


def test_error_of_a_single_row_out_of_memory_has_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, evaluations=[{"decoding": "greedy"}])
    fail_batches_larger_than(0, monkeypatch)
    (line,) = run_grid(grid, options(tmp_path / "outputs")).failures
    assert grid.cells[0].fingerprint in line
    assert "one row at a time: take smaller models, shorter max_input_tokens" in line
    assert "smaller models" in line
