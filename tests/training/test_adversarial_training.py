"""The adversarial term in training: packed cells, micro-batches, checkpoints and the divergence beside it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses

from ..losses.descriptions import adversarial_loss
from ..models.tiny import FAMILIES
from .driving import Run, Stopped, assert_close, assert_identical, cell, distil, stop_at

READS = ("hidden_states", "sequences")
LOG_2 = math.log(2)


def terms(reads: str, weight: float = 0.5, **more: Any) -> WeightedLosses:
    return WeightedLoss(Divergence(beta=0.5)), WeightedLoss(
        adversarial_loss(reads=reads, width=8, **more), weight
    )


def three(folder: Path) -> list[Any]:
    return [
        cell(folder, "0", lmbda=0.5, objectives=terms("hidden_states", learning_rate=3e-4)),
        cell(folder, "1", lmbda=1.0, seed=1, objectives=terms("sequences", label_smoothing=0.1)),
        cell(folder, "2", lmbda=0.0, objectives=terms("sequences", 0.2, layers=1)),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("float64_norms")
def test_three_packed_cells_equal_cells_trained_alone(family: Family, tmp_path: Path) -> None:
    cells = three(tmp_path)
    together = distil(tmp_path, family, cells, max_steps=8)
    for n, one in enumerate(cells):
        alone = distil(tmp_path, family, [one], packed=False, max_steps=8)
        assert_close(together.weights(n), alone.weights())
        assert_close(states(together, n), states(alone, 0))
        for mine, its in zip(together.history[n], alone.history[0], strict=True):
            assert mine.pop("grad_norm") == pytest.approx(its.pop("grad_norm"), rel=1e-6)
            assert mine == pytest.approx(its, abs=1e-9)
    assert {"loss/adversarial", "adversarial/accuracy_student"} <= together.history[0][0].keys()


def states(run: Run, n: int) -> dict[str, Tensor]:
    """Of the cell's only module."""
    (own,) = run.trainer.auxiliary_modules._cell_modules(n).values()
    return own.module.state_dict()


@pytest.mark.usefixtures("float64_norms")
def test_micro_batches_make_the_update_of_their_sum(tmp_path: Path) -> None:
    runs = [
        distil(
            tmp_path,
            "decoder-only",
            three(tmp_path),
            max_steps=4,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
        )
        for parts in (1, 2)
    ]
    for n in range(3):
        assert_close(states(runs[0], n), states(runs[1], n))
        for mine, its in zip(runs[0].history[n], runs[1].history[n], strict=True):
            assert mine["adversarial/accuracy_student"] == pytest.approx(its["adversarial/accuracy_student"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", (True, False))
def test_the_game_is_resumed_bit_for_bit(family: Family, packed: bool, tmp_path: Path) -> None:
    """The discriminator, its optimizer and what is logged of it; the exported student knows nothing of it."""
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "packed": packed,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    folders = [tmp_path / name for name in "ab"]
    asked = [three(folder)[: 3 if packed else 1] for folder in folders]
    straight = distil(folders[0], family, asked[0], **options)
    with pytest.raises(Stopped):
        distil(folders[1], family, asked[1], prepare=stop_at(3), **options)
    place = Path(asked[1][0].output_dir if packed else folders[1]) / "checkpoint-3"
    resumed = distil(folders[1], family, asked[1], resume=str(place), **options)
    for n in range(len(asked[0])):
        assert_identical(resumed.weights(n), straight.weights(n))
        assert_identical(states(resumed, n), states(straight, n))
        assert resumed.history[n] == straight.history[n][3:]
    last = place.with_name("checkpoint-6")
    kept = load_file(last / "step_modules.safetensors")
    assert any("optimizer" in name for name in kept)
    assert not any("judge" in name for name in load_file(last / "model.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reads", READS)
def test_beside_it_a_divergence_falls_nearly_as_far_as_alone(
    family: Family, reads: str, tmp_path: Path
) -> None:
    weights = (0.1, 1.0)
    objectives = [terms(reads)[:1], *(terms(reads, weight) for weight in weights)]
    cells = [
        cell(tmp_path, str(n), lmbda=0.5, learning_rate=1e-3, objectives=own)
        for n, own in enumerate(objectives)
    ]
    run = distil(tmp_path, family, cells, dtype=torch.float32, max_steps=60)
    assert not run.trainer.failures
    alone, *games = run.history
    for weight, rows in zip(weights, games, strict=True):
        assert fall(rows, "loss/divergence") > 2 / 3 * fall(alone, "loss") > 0
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert rows[0]["loss/adversarial"] == pytest.approx(weight * LOG_2, rel=1e-5)
        assert 0.6 < max(row["adversarial/accuracy_student"] for row in rows) <= 1


def fall(rows: list[dict[str, float]], name: str) -> float:
    """From the mean of the first ten steps to that of the last ten."""
    values = [row[name] for row in rows]
    return (sum(values[:10]) - sum(values[-10:])) / 10
