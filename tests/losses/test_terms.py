"""A loss of several weighted terms: values, gradients, what is logged, and what cannot be asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.cell_losses import CellLosses
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.fused_loss import compute_cell_losses
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses, term_names
from gkd_lab.models.projection import Projection
from gkd_lab.training.arguments import GKDConfig

from ..models.tiny import FAMILIES, tiny_model
from ..training.driving import cell, distil
from .descriptions import parse
from .loss_problems import normal

CELLS, TOKENS, WIDTH, VOCABULARY = 3, 7, 5, 11
HARD, SOFT = CrossEntropy(), Divergence(beta=0.1, teacher_temperature=0.5)
LISTS: tuple[WeightedLosses, ...] = (
    (WeightedLoss(SOFT), WeightedLoss(HARD, 0.5)),
    (WeightedLoss(HARD),),
    (WeightedLoss(HARD, 0.3), WeightedLoss(Divergence(beta=1.0), 2.0), WeightedLoss(Divergence("tv"), 0.0)),
)


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "student": normal(1, CELLS, TOKENS, WIDTH).requires_grad_(),
        "student_head": Projection(normal(2, CELLS, VOCABULARY, WIDTH).requires_grad_()),
        "teacher": normal(3, 1, TOKENS, WIDTH),
        "teacher_head": Projection(normal(4, VOCABULARY, WIDTH)),
        "block_of_cell": (0, 0, 0),
        "weights": torch.rand(CELLS, TOKENS, generator=generator, dtype=torch.float64),
        "labels": torch.randint(VOCABULARY, (CELLS, TOKENS), generator=generator),
    }


def dense(loss_arguments: dict[str, Any], terms: WeightedLosses, n: int) -> list[Tensor]:
    """What each term adds to the loss of cell n, by plain formulas."""
    student = loss_arguments["student"][n] @ loss_arguments["student_head"].weight[n].T
    teacher = loss_arguments["teacher"][0] @ loss_arguments["teacher_head"].weight.T
    values = []
    for term in terms:
        if isinstance(term.loss, CrossEntropy):
            each = functional.cross_entropy(student, loss_arguments["labels"][n], reduction="none")
        else:
            each = term.loss(student, teacher)
        values.append(term.weight * (each * loss_arguments["weights"][n]).sum())
    return values


def test_values_and_gradients_are_the_weighted_sums_of_the_terms() -> None:
    loss_arguments = tensors()
    sums = compute_cell_losses(terms=LISTS, **loss_arguments)
    for n, terms in enumerate(LISTS):
        expected = dense(loss_arguments, terms, n)
        torch.testing.assert_close(sums.losses[n], torch.stack(expected).sum())
        for k, value in enumerate(expected):
            torch.testing.assert_close(sums.terms[n, k], value.detach())
    parameters = [loss_arguments["student"], loss_arguments["student_head"].weight]
    ours = torch.autograd.grad(sums.losses.sum(), parameters)
    total = torch.stack(
        [value for n, terms in enumerate(LISTS) for value in dense(loss_arguments, terms, n)]
    ).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(total, parameters))


def test_cross_entropy_is_finite_where_a_token_is_excluded() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    value, gradient, entropy = HARD.value_and_gradient(logits, torch.tensor([1]))
    assert all(tensor.isfinite().all() for tensor in (value, gradient, entropy))
    assert value > 1e30


def test_cross_entropy_needs_no_teacher() -> None:
    loss_arguments = tensors() | {"teacher": None, "teacher_head": None, "block_of_cell": (0, 1, 2)}
    sums = compute_cell_losses(terms=[HARD] * CELLS, **loss_arguments)
    expected = torch.stack([dense(tensors(), (WeightedLoss(HARD),), n)[0] for n in range(CELLS)])
    torch.testing.assert_close(sums.losses, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None, "teacher_head": None}, "divergence compares"),
        ({"labels": None}, "cross-entropy reads"),
    ],
)
def test_missing_inputs_of_a_term_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_cell_losses(terms=LISTS, **(tensors() | changes))


def compute_losses(objectives: WeightedLosses) -> CellLosses:
    loss_arguments = tensors()
    return compute_cell_losses(terms=[objectives] * CELLS, **loss_arguments)


def test_two_divergences_of_half_the_weight_are_one() -> None:
    halves = compute_losses((WeightedLoss(SOFT, 0.5), WeightedLoss(SOFT, 0.5)))
    torch.testing.assert_close(halves.losses, compute_losses((WeightedLoss(SOFT),)).losses)
    torch.testing.assert_close(halves.entropies, compute_losses((WeightedLoss(SOFT),)).entropies)


# ---- in the trainer ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", (True, False))
def test_each_term_is_logged_and_they_add_up(family: str, packed: bool, tmp_path: Path) -> None:
    terms = (WeightedLoss(SOFT), WeightedLoss(HARD, 0.5))
    cells = [cell(tmp_path, str(n), lmbda=0.5, objectives=terms) for n in range(2 if packed else 1)]
    run = distil(tmp_path, family, cells, packed=packed)  # type: ignore[arg-type]
    plain = distil(tmp_path, family, [cell(tmp_path, "2", lmbda=0.5)], packed=False)  # type: ignore[arg-type]
    for row in run.history[0]:
        parts = row["loss/divergence"], row["loss/cross_entropy"]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-9)
        assert (parts[1] == 0) == (row["on_policy"] == 1)
    assert {row["on_policy"] for row in run.history[0]} == {0.0, 1.0}
    assert not any("loss/divergence" in row for row in plain.history[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_alone_is_supervised_fine_tuning(family: str, tmp_path: Path) -> None:
    """The first step's loss is the model's own, and no teacher is read."""
    cells = [cell(tmp_path, lmbda=0.0, objectives=(WeightedLoss(HARD),))]
    read: list[Any] = []

    def watch(trainer: Any) -> None:
        trainer.teacher_model.register_forward_pre_hook(lambda *_: read.append(1))

    run = distil(tmp_path, family, cells, packed=False, loss_normalization="token", prepare=watch)  # type: ignore[arg-type]
    assert not read
    model = tiny_model(family, 7)  # type: ignore[arg-type]
    batch = next(iter(run.trainer.get_train_dataloader()))
    if family == "encoder-decoder":
        labels = batch["completion_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        own = model(input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"], labels=labels).loss
    else:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        labels = torch.cat([torch.full_like(batch["prompt_ids"], -100), batch["completion_ids"]], 1)
        own = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            labels=labels.masked_fill(mask == 0, -100),
        ).loss
    assert run.losses()[0] == pytest.approx(own.item(), rel=1e-6)
    assert run.losses()[-1] < run.losses()[0]


@pytest.mark.parametrize("packed", (True, False))
def test_a_weight_moves_linearly_over_the_training(packed: bool, tmp_path: Path) -> None:
    """At rate 0 the terms' values stay, so that what is logged shows the weights."""
    moving = (WeightedLoss(SOFT, 1.0, 0.0), WeightedLoss(HARD, 0.0, 2.0))
    cells = [
        cell(tmp_path, str(n), lmbda=0.0, learning_rate=0.0, objectives=terms)
        for n, terms in enumerate((moving, (WeightedLoss(SOFT), WeightedLoss(HARD))) if packed else (moving,))
    ]
    run = distil(tmp_path, "decoder-only", cells, packed=packed, max_steps=5)
    still = (
        run.history[1]
        if packed
        else distil(
            tmp_path,
            "decoder-only",
            [
                cell(
                    tmp_path,
                    "s",
                    lmbda=0.0,
                    learning_rate=0.0,
                    objectives=(WeightedLoss(SOFT), WeightedLoss(HARD)),
                )
            ],
            packed=False,
            max_steps=5,
        ).history[0]
    )
    for step, (row, plain) in enumerate(zip(run.history[0], still, strict=True)):
        share = step / 4
        assert row["loss/divergence"] == pytest.approx((1 - share) * plain["loss/divergence"], rel=1e-9)
        assert row["loss/cross_entropy"] == pytest.approx(2 * share * plain["loss/cross_entropy"], rel=1e-9)


def test_cross_entropy_is_refused_on_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lmbda 0.5 .*cross-entropy"):
        cell(tmp_path, lmbda=0.5, objectives=(WeightedLoss(HARD),))


# ---- in a configuration ----


def test_a_configuration_lists_terms_without_the_fields_set_elsewhere(tmp_path: Path) -> None:
    listed = [{"type": "divergence", "beta": 0.1}, {"type": "cross_entropy", "weight": 0.5}]
    config = GKDConfig(
        output_dir=str(tmp_path), teacher_temperature=0.3, objectives=listed, bf16=False, use_cpu=True
    )
    made = CellArguments.build(config)
    assert made.objectives == (
        WeightedLoss(Divergence(beta=0.1, teacher_temperature=0.3)),
        WeightedLoss(HARD, 0.5),
    )
    assert term_names(made.list_terms()) == ["divergence", "cross_entropy"]


def test_several_terms_of_a_kind_are_numbered() -> None:
    assert term_names((WeightedLoss(SOFT), WeightedLoss(HARD), WeightedLoss(SOFT))) == [
        "divergence",
        "cross_entropy",
        "divergence_2",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "divergance"}, "type: 'divergance' .*'divergence'"),
        ({"weight": -1}, "weight: -1"),
        ({"final_weight": "x"}, "final_weight: 'x'"),
        ({"gamma": 1}, "gamma'; .*beta, weight"),
        ({"type": "cross_entropy", "beta": 1}, "beta'; .*valid: weight, final_weight, type$"),
        ({"beta": 2}, "beta: 2"),
    ],
)
def test_a_term_that_is_not_understood_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([fields])
