"""TF32 is on while the cells that ask for it train, and refused where no device has it."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from gkd_lab.config import ConfigError
from gkd_lab.runner import tf32
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.tf32 import use_tf32

from .tiny_experiments import options, tiny_grid


def read_mode() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


def test_the_mode_is_as_before_after_a_block_and_after_an_error_in_it() -> None:
    before = read_mode()
    with pytest.raises(ZeroDivisionError), use_tf32(True):
        assert read_mode() == "tf32"
        raise ZeroDivisionError
    assert read_mode() == before != "tf32"
    for _ in range(2):  # a process may switch as often as it has cells
        with use_tf32(True):
            assert read_mode() == "tf32"
        with use_tf32(False):
            assert read_mode() == before


def test_only_cells_that_ask_for_it_train_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf32, "is_torch_tf32_available", lambda: True)
    modes: list[str] = []
    training_step = Trainer.training_step

    def training_step_with_mode(self: Trainer, *args: object, **arguments: object) -> torch.Tensor:
        modes.append(read_mode())
        return training_step(self, *args, **arguments)

    monkeypatch.setattr(Trainer, "training_step", training_step_with_mode)
    before = read_mode()
    axes = {"tf32": [True, False], "implementation": ["gkd_lab", "trl"], "lmbda": [0]}
    grid = tiny_grid(tmp_path, "arithmetic", grid=axes, beta=0.5)
    assert run_grid(grid, options(tmp_path / "outputs")).failures == []
    # 4 steps of teacher and SFT student, then of each cell.
    assert modes[:8] == [before] * 8
    assert sorted(modes[8:]) == sorted(["tf32"] * 8 + [before] * 8)
    assert read_mode() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU may have TF32")
def test_it_is_refused_by_name_without_a_gpu_before_anything_runs(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"tf32": [False, True]})
    with pytest.raises(ConfigError, match="tf32: true needs an NVIDIA GPU"):
        run_grid(grid, options(tmp_path / "outputs"))
    assert not list((tmp_path / "outputs").glob("nano/*"))
