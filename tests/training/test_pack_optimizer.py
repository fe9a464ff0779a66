"""A pack's optimizer on stacked weights does to each cell what it does to the cell's own tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from gkd_lab.models.packing import Pack
from gkd_lab.training import strategies
from gkd_lab.training.pack_optimizer import (
    ParameterBlock,
    build_blocks,
    build_parameter_groups,
    hand_over_gradients,
)
from gkd_lab.training.trainer import GKDTrainer

from ..models.tiny import tiny_model
from .driving import Run, Stopped, assert_close, assert_identical, cell, distil, stop_at

RATES = (3e-3, 3e-3, 1e-3, 3e-3)


class Stepper:
    """A pack of four cells and an optimizer, which takes steps along made gradients."""

    def __init__(self, folder: Path, *, stacked: bool, dtype: torch.dtype = torch.float64, **options: Any):
        self.pack = Pack.build([tiny_model("decoder-only", seed, dtype=dtype) for seed in range(4)])
        cells = [cell(folder, str(n), learning_rate=rate) for n, rate in enumerate(RATES)]
        self.blocks = build_blocks(self.pack, RATES, stacked=stacked)
        decayed = {name for name, p in self.pack.model.named_parameters() if p.dim() > 2}
        groups = build_parameter_groups(self.blocks, cells, decayed, 0.1)
        self.optimizer = torch.optim.AdamW(groups, **options)

    def step(self, count: int, first: int = 0) -> None:
        for number in range(first, first + count):
            generator = torch.Generator().manual_seed(number)
            for parameter in self.pack.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            hand_over_gradients(self.pack.model, self.blocks, ())
            self.optimizer.step()

    def read_states(self) -> list[dict[str, Any]]:
        return [block.read_cell_state(n, self.optimizer) for block in self.blocks for n in block.cells]

    def write_states(self, states: Sequence[dict[str, Any]]) -> None:
        for block in self.blocks:
            block.write_state([states[n] for n in block.cells], self.optimizer)


@pytest.mark.parametrize("foreach", (True, False))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_stacked_cells_are_updated_bit_for_bit_as_apart(
    dtype: torch.dtype, foreach: bool, tmp_path: Path
) -> None:
    together = Stepper(tmp_path, stacked=True, dtype=dtype, foreach=foreach)
    apart = Stepper(tmp_path, stacked=False, dtype=dtype, foreach=foreach)
    for stepper in (together, apart):
        stepper.step(5)
    for n in range(4):
        assert_identical(together.pack.get_cell_parameters(n), apart.pack.get_cell_parameters(n))
        assert_identical(together.read_states()[n], apart.read_states()[n])


def test_the_fused_kernel_differs_by_rounding_alone(tmp_path: Path) -> None:
    """On a CPU it computes a tensor's last few elements, where no vector is full, by other instructions."""
    together, apart = (Stepper(tmp_path, stacked=stacked, fused=True) for stacked in (True, False))
    for stepper in (together, apart):
        stepper.step(5)
    for n in range(4):
        weights = together.pack.get_cell_parameters(n)
        assert_close(weights, apart.pack.get_cell_parameters(n), 4 * torch.finfo(torch.float64).eps)


def test_neighbours_of_one_rate_are_one_block_and_every_cell_has_its_rate(tmp_path: Path) -> None:
    stepper = Stepper(tmp_path, stacked=True)
    assert [list(block.cells) for block in stepper.blocks] == [[0, 1], [2], [3]]
    n_weights = len(stepper.pack.get_cell_parameters(0))
    groups = stepper.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (3e-3, 0.1), (3e-3, 0.0), (1e-3, 0.1), (1e-3, 0.0),
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == 3 * n_weights
    equal = build_blocks(stepper.pack, [1e-3] * 4, stacked=True)
    assert [list(block.cells) for block in equal] == [[0, 1, 2, 3]]
    assert len(equal[0].parameters) == n_weights


@pytest.mark.parametrize("saved_stacked", (True, False))
def test_state_of_cells_can_be_continued_stacked_and_apart(saved_stacked: bool, tmp_path: Path) -> None:
    """What a checkpoint holds says nothing of blocks: tensors in the shapes of a plain model."""
    saved = Stepper(tmp_path, stacked=saved_stacked, foreach=True)
    saved.step(2)
    states = [{key: value.clone() for key, value in entries.items()} for entries in saved.read_states()]
    shapes = {name: p.shape for name, p in tiny_model("decoder-only", 0).named_parameters()}
    for key, value in states[1].items():
        entry, _, name = key.partition(":")
        assert value.shape == (torch.Size() if entry == "step" else shapes[name])
    resumed = Stepper(tmp_path, stacked=not saved_stacked, foreach=True)
    with torch.no_grad():
        for mine, its in zip(resumed.pack.model.parameters(), saved.pack.model.parameters(), strict=True):
            mine.copy_(its)
    resumed.write_states(states)
    for stepper in (saved, resumed):
        stepper.step(3, first=2)
    for n in range(4):
        assert_identical(resumed.pack.get_cell_parameters(n), saved.pack.get_cell_parameters(n))


def test_a_step_counter_is_on_the_device_where_the_kernel_reads_it_there() -> None:
    parameter = nn.Parameter(torch.empty(2, 3, device="meta"))
    block = ParameterBlock(range(2), {"w": parameter}, is_stacked=True)
    entries = {"step:w": torch.tensor(4.0), "exp_avg:w": torch.ones(3)}
    for capturable, device in ((True, "meta"), (False, "cpu")):
        optimizer = torch.optim.AdamW([parameter], capturable=capturable)
        block.write_state([entries, entries], optimizer)
        assert optimizer.state[parameter]["step"].device.type == device
        assert optimizer.state[parameter]["exp_avg"].shape == (2, 3)
        assert optimizer.state[parameter]["exp_avg"].device.type == "meta"


# ---- in a training ----


@pytest.mark.parametrize(("optimizer", "tensors"), (("adamw_torch", 1), ("adafactor", 3)))
def test_cells_of_one_rate_are_stacked_except_by_adafactor(
    optimizer: str, tensors: int, tmp_path: Path
) -> None:
    cells = [cell(tmp_path, str(n), lmbda=0, beta=n / 2) for n in range(3)]
    run = distil(tmp_path, "decoder-only", cells, optim=optimizer, max_steps=1)
    groups = run.trainer.optimizer.param_groups
    weights = len(run.weights())
    assert sum(len(group["params"]) for group in groups) == tensors * weights


def test_a_training_on_stacked_weights_is_that_of_cells_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: learning rates and schedule, decay, clipping, logs and sampled tokens."""

    def train() -> Run:
        rates = (3e-4, 3e-4, 1e-4)
        cells = [cell(tmp_path, str(n), beta=n / 2, learning_rate=rate) for n, rate in enumerate(rates)]
        return distil(tmp_path, "decoder-only", cells, optim="adamw_torch", weight_decay=0.1)

    together = train()
    monkeypatch.setattr(strategies, "STACKABLE_OPTIMIZERS", ())
    apart = train()
    assert len(together.trainer.strategy.blocks) == 2 and len(apart.trainer.strategy.blocks) == 3
    for n in range(3):
        assert together.history[n] == apart.history[n]
        assert_identical(together.weights(n), apart.weights(n))


class FailingCallback(TrainerCallback):
    """Fails a cell before a step, and keeps its weights."""

    def __init__(self, trainer: GKDTrainer, failed: int, step: int) -> None:
        self.trainer, self.failed, self.step = trainer, failed, step
        self.weights: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            parameters = self.trainer.pack.get_cell_parameters(self.failed)
            self.weights = {name: value.clone() for name, value in parameters.items()}
            self.trainer.fail_cell(self.failed, "a reward is nan")


@pytest.mark.parametrize("optimizer", ("adamw_torch_fused", "adafactor"))
def test_a_failed_cell_stays_as_it_was_although_its_gradient_is_finite(
    optimizer: str, tmp_path: Path
) -> None:
    """Its momentum would move it, and its neighbours share its tensors."""
    cells = [cell(tmp_path, str(n), beta=n / 2) for n in range(3)]
    callbacks: list[FailingCallback] = []

    def fail_at_step_3(trainer: GKDTrainer) -> None:
        callbacks.append(FailingCallback(trainer, 1, 3))
        trainer.add_callback(callbacks[0])

    run = distil(tmp_path, "decoder-only", cells, prepare=fail_at_step_3, optim=optimizer)
    healthy = distil(tmp_path, "decoder-only", cells, optim=optimizer)
    assert list(run.trainer.failures) == [1]
    assert_identical(run.weights(1), callbacks[0].weights)
    assert not all(torch.equal(value, run.weights(1)[name]) for name, value in healthy.weights(1).items())
    for n in (0, 2):
        assert run.history[n] == healthy.history[n]
        assert_identical(run.weights(n), healthy.weights(n))


def test_cells_that_made_different_numbers_of_updates_resume_with_their_own(tmp_path: Path) -> None:
    """As where fp16 left out a step of one pack, and its cells are in another pack now."""
    options: dict[str, Any] = {
        "optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    cells = [cell(tmp_path, str(n), beta=n / 2) for n in range(3)]
    with pytest.raises(Stopped):
        distil(tmp_path, "decoder-only", cells, prepare=stop_at(2), **options)
    file = Path(cells[2].output_dir) / "checkpoint-2" / "optimizer.safetensors"
    entries = load_file(file)
    counters = {key: value for key, value in entries.items() if key.startswith("step:")}
    assert counters and all(value == 2 for value in counters.values())
    save_file(entries | {key: value - 1 for key, value in counters.items()}, file)
    resumed = distil(tmp_path, "decoder-only", cells, resume=f"{cells[0].output_dir}/checkpoint-2", **options)
    strategy, optimizer = resumed.trainer.strategy, resumed.trainer.optimizer
    assert [list(block.cells) for block in strategy.blocks] == [[0, 1], [2]]
    for block, updates in zip(strategy.blocks, (4, 3), strict=True):
        state = block.read_cell_state(block.cells.start, optimizer)
        assert {int(value) for key, value in state.items() if key.startswith("step:")} == {updates}
