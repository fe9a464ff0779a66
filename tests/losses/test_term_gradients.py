"""The gradient of each term by itself: norms, sums, and that looking changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses

from ..models.tiny import FAMILIES, tiny_model
from ..training.driving import assert_identical, cell, distil

TERMS: WeightedLosses = (WeightedLoss(Divergence(beta=0.1)), WeightedLoss(CrossEntropy(), 0.5))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", (True, False))
def test_norms_are_those_of_losses_of_one_term(family: Family, packed: bool, tmp_path: Path) -> None:
    """Against trainers whose loss is that term alone."""
    cells = [cell(tmp_path, str(n), lmbda=0.0, objectives=TERMS) for n in range(2 if packed else 1)]
    run = distil(tmp_path, family, cells, packed=packed, max_steps=1, learning_rate=0.0)
    batch = next(iter(run.trainer.get_train_dataloader()))
    both = run.trainer.term_gradients(batch)
    for place, name in enumerate(("divergence", "cross_entropy")):
        alone = [cell(tmp_path, "a", lmbda=0.0, objectives=(TERMS[place],))]
        single = distil(tmp_path, family, alone, packed=False, max_steps=1, learning_rate=0.0).trainer
        loss = single.compute_loss(single.model, batch)
        gradients = torch.autograd.grad(
            loss, [p for p in single.model.parameters() if p.requires_grad], allow_unused=True
        )
        norm = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
        for own in both:
            assert own[name] == pytest.approx(norm.item(), rel=1e-9)


@pytest.mark.parametrize("packed", (True, False))
def test_logging_gradients_does_not_change_the_training(packed: bool, tmp_path: Path) -> None:
    cells = [cell(tmp_path, str(n), objectives=TERMS) for n in range(2 if packed else 1)]
    found: list[Any] = [
        distil(tmp_path, "decoder-only", cells, packed=packed, log_term_gradients=asked)
        for asked in (True, False)
    ]
    for n in range(len(cells)):
        assert_identical(found[0].weights(n), found[1].weights(n))
    for row, plain in zip(found[0].history[0], found[1].history[0], strict=True):
        assert row.keys() - plain.keys() == {"grad_norm/divergence", "grad_norm/cross_entropy"}
        assert row["grad_norm/divergence"] > 0
        assert (row["grad_norm/cross_entropy"] == 0) == (row["on_policy"] == 1)


def distil_with_dropout(tmp_path: Path, *, packed: bool, objectives: WeightedLosses, **changes: Any) -> Any:
    cells = [cell(tmp_path, str(n), objectives=objectives) for n in range(2 if packed else 1)]
    return distil(
        tmp_path,
        "decoder-only",
        cells,
        packed=packed,
        students=[tiny_model("decoder-only", 7, dropout=0.3) for _ in cells],
        max_grad_norm=0.0,
        **{"disable_dropout": False, **changes},
    )


@pytest.mark.parametrize("parts", (1, 2))
@pytest.mark.parametrize("packed", (True, False))
def test_logging_gradients_draws_no_dropout_from_the_training(
    packed: bool, parts: int, tmp_path: Path
) -> None:
    plain, logged = (
        distil_with_dropout(
            tmp_path,
            packed=packed,
            objectives=TERMS,
            gradient_accumulation_steps=parts,
            log_term_gradients=asked,
        )
        for asked in (False, True)
    )
    for n in range(2 if packed else 1):
        assert_identical(logged.weights(n), plain.weights(n))
        for row, plain_row in zip(logged.history[n], plain.history[n], strict=True):
            assert {key: row[key] for key in plain_row} == plain_row
            assert row["grad_norm/divergence"] > 0
    without = distil_with_dropout(
        tmp_path,
        packed=packed,
        objectives=TERMS,
        gradient_accumulation_steps=parts,
        disable_dropout=True,
    )
    assert without.losses() != plain.losses(), "dropout must do something here"


def test_a_term_is_measured_with_the_dropout_of_its_step(tmp_path: Path) -> None:
    """The norm of the only term is the norm of the step."""
    run = distil_with_dropout(tmp_path, packed=False, objectives=TERMS[:1], log_term_gradients=True)
    for row in run.history[0]:
        assert row["grad_norm/divergence"] == pytest.approx(row["grad_norm"], rel=1e-6)
