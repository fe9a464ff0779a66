"""Packed cells are trained as cells alone, each with its own weight, optimizer and clipping."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.optimization import Adafactor

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses import chunk_sums
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.terms import WeightedLoss
from gkd_lab.training.trainer import GKDTrainer

from ..models.tiny import FAMILIES, tiny_model
from .driving import assert_close, assert_identical, cell, distil, largest_difference, mixed

pytestmark = pytest.mark.usefixtures("float64_norms")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_at_once_as_on_a_gpu_train_the_same_cells(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = mixed(tmp_path)
    expected = distil(tmp_path, family, cells)
    monkeypatch.setattr(chunk_sums, "takes_all_blocks", lambda device: True)
    together = distil(tmp_path, family, cells)
    for n in range(len(cells)):
        assert largest_difference(together, expected, n, n) < 1e-9
        assert_close(together.weights(n), expected.weights(n))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ("adamw_torch_fused", "adafactor"))
def test_packed_cells_equal_cells_trained_alone(family: Family, optimizer: str, tmp_path: Path) -> None:
    """Twenty steps over four epochs. Other sampled tokens would show in the losses at once."""
    cells = mixed(tmp_path)
    together = distil(tmp_path, family, cells, optim=optimizer, max_steps=20)
    assert together.trainer.failures == {}
    for n, cell_args in enumerate(cells):
        alone = distil(tmp_path, family, [cell_args], packed=False, optim=optimizer, max_steps=20)
        assert largest_difference(together, alone, n, 0) < 1e-9
        assert_close(together.weights(n), alone.weights())
        for mine, its in zip(together.history[n], alone.history[0], strict=True):
            norms = mine.pop("grad_norm"), its.pop("grad_norm")
            assert norms[0] == pytest.approx(norms[1], rel=1e-6)  # where it is steep, 1e-16 shows
            assert mine == pytest.approx(its, abs=1e-9)
    assert len({tuple(together.losses(n)) for n in range(len(cells))}) == len(cells)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_packed_and_alone_have_the_same_losses(family: Family, tmp_path: Path) -> None:
    cells = mixed(tmp_path)
    together = distil(tmp_path, family, cells, dtype=torch.float32, max_steps=3)
    for n, cell_args in enumerate(cells):
        alone = distil(tmp_path, family, [cell_args], packed=False, dtype=torch.float32, max_steps=3)
        assert largest_difference(together, alone, n, 0) < 1e-5


def test_adafactor_of_a_member_is_that_of_transformers(tmp_path: Path) -> None:
    """Its factored moments and its RMS clip see one cell's tensor, never the stack."""
    seen: list[list[dict[str, Tensor]]] = [[], []]

    def watch(trainer: GKDTrainer) -> None:
        def before_step(*_: Any) -> None:
            for n, block in enumerate(trainer.strategy.blocks):
                gradients = {k: v.grad.clone() for k, v in block.parameters.items() if v.grad is not None}
                seen[n].append(gradients)

        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(before_step)

    cells = [cell(tmp_path, "0", lmbda=0, beta=0), cell(tmp_path, "1", lmbda=0, beta=1)]
    run = distil(
        tmp_path,
        "encoder-decoder",
        cells,
        optim="adafactor",
        max_steps=4,
        lr_scheduler_type="constant",
        lr_scheduler_kwargs={},
        warmup_steps=0,
        prepare=watch,
    )
    for n in range(2):
        plain = tiny_model("encoder-decoder", 7)
        expected_optimizer = Adafactor(
            plain.parameters(), lr=3e-4, scale_parameter=False, relative_step=False
        )
        assert len(seen[n]) == 4
        for gradients in seen[n]:
            for name, parameter in plain.named_parameters():
                parameter.grad = gradients[name]
            expected_optimizer.step()
        assert_close(run.weights(n), {k: p.detach() for k, p in plain.named_parameters()}, 1e-12)


@pytest.mark.parametrize("packed", (True, False))
def test_a_cell_s_loss_has_its_own_weight(packed: bool, tmp_path: Path) -> None:
    """Without clipping, gradients follow; Adam's step hardly does, so the first step's norm is looked at."""
    weights = (1.0, 3.0, 0.0) if packed else (3.0,)
    of_cells = [(WeightedLoss(Divergence(beta=0.5), weight),) for weight in weights]
    cells = [cell(tmp_path, str(n), objectives=terms) for n, terms in enumerate(of_cells)]
    whole = distil(
        tmp_path, "decoder-only", [cell(tmp_path, "1")], packed=False, max_steps=1, max_grad_norm=0
    )
    run = distil(tmp_path, "decoder-only", cells, packed=packed, max_steps=1, max_grad_norm=0)
    for n, weight in enumerate(weights):
        for name in ("loss", "grad_norm"):
            assert run.history[n][0][name] == pytest.approx(weight * whole.history[0][0][name], rel=1e-9)
        assert run.history[n][0]["entropy"] == pytest.approx(whole.history[0][0]["entropy"], rel=1e-9)


def test_clipping_is_per_cell(tmp_path: Path) -> None:
    """A cell whose gradient is a thousand times larger takes nothing from its neighbours."""
    calm = cell(tmp_path, "0", lmbda=0, beta=0.5)
    wild = cell(tmp_path, "1", lmbda=0, beta=1.0, teacher_temperature=1e-3)
    options: dict[str, Any] = {"max_steps": 4, "max_grad_norm": 0.05, "optim": "sgd"}
    with_wild = distil(tmp_path, "decoder-only", [calm, wild], **options)
    with_calm = distil(tmp_path, "decoder-only", [calm, calm], **options)
    assert with_wild.history[1][0]["grad_norm"] > 100 * with_wild.history[0][0]["grad_norm"]
    assert with_wild.history[0][0]["grad_norm"] > 0.05, "both are clipped"
    assert_identical(with_wild.weights(0), with_calm.weights(0))


def test_without_a_limit_nothing_is_clipped(tmp_path: Path) -> None:
    cell_args = cell(tmp_path, lmbda=0, learning_rate=1e-1)
    options: dict[str, Any] = {"max_steps": 4, "optim": "sgd"}
    free = distil(tmp_path, "decoder-only", [cell_args], max_grad_norm=0.0, **options)
    loose = distil(tmp_path, "decoder-only", [cell_args], max_grad_norm=1e9, **options)
    tight = distil(tmp_path, "decoder-only", [cell_args], max_grad_norm=1e-3, **options)
    assert_close(free.weights(), loose.weights(), 1e-12)
    moved = sum((free.weights()[k] - tight.weights()[k]).abs().sum() for k in free.weights())
    assert moved > 1e-3
