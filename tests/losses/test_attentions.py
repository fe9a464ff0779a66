"""Matching of attention maps: values and gradients by plain formulas, and what gives no maps."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses.attentions import (
    AttentionLoss,
    AttentionModule,
    attention_kl,
    attention_score_mse,
    enable_attention_maps,
)
from gkd_lab.losses.auxiliary_losses import LossInputs
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.layer_stacks import StackName
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses

from ..models.tiny import FAMILIES, tiny_model
from ..training.driving import assert_close, cell, distil
from ..training.passes import COMPLETIONS, PROMPTS, longer, rows, seen
from .descriptions import attention_loss, parse

CASES: list[tuple[Family, StackName]] = [
    ("decoder-only", "decoder"),
    ("encoder-decoder", "decoder"),
    ("encoder-decoder", "encoder"),
]
Loss = Literal["mse", "kl"]


def pair(family: Family, heads: int = 4) -> tuple[PreTrainedModel, PreTrainedModel]:
    """In float32: see `give_maps`. The encoder-decoder's maps are computed in float32 in any case."""
    models = (
        tiny_model(family, 7, dtype=torch.float32),
        tiny_model(family, 3, width=32, heads=heads, dtype=torch.float32),
    )
    for model in models:
        enable_attention_maps(model)
    return models


def build_module(measure: AttentionLoss, models: tuple[PreTrainedModel, PreTrainedModel]) -> AttentionModule:
    made = measure.create_module(models[0].config, models[1].config, seed=5)
    assert isinstance(made, AttentionModule)
    return made


def test_the_distances_of_two_maps_are_those_worked_out_by_hand() -> None:
    """Scores (0, 1, 2) and (0, 0, 0): centred (-1, 0, 1), so 2 / 3 in the mean. The last key is hidden."""
    scores = torch.tensor([0.0, 1.0, 2.0])
    student = torch.cat([scores.softmax(0), torch.zeros(1)])[None, None]
    teacher = torch.cat([torch.full((3,), 1 / 3), torch.zeros(1)])[None, None]
    assert attention_score_mse(student, teacher).item() == pytest.approx(2 / 3, rel=1e-6)
    expected = sum(1 / 3 * math.log(1 / 3 / p) for p in scores.softmax(0).tolist())
    assert attention_kl(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_what_is_added_to_all_scores_of_a_query_counts_for_nothing() -> None:
    scores = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    maps = [(scores + shift).softmax(-1) for shift in (0.0, 7.0)]
    torch.testing.assert_close(attention_score_mse(*maps), torch.zeros(3, 2), atol=1e-10, rtol=0)


def test_the_gradient_by_the_scores_is_that_of_their_own_squares() -> None:
    """TinyBERT's on centred scores, though it comes by way of the softmax."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 2, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    gradient = torch.autograd.grad(
        attention_score_mse(student.softmax(-1), teacher.softmax(-1)).sum(), student
    )[0]
    difference = student - teacher
    centred = (difference - difference.mean(-1, keepdim=True)).detach()
    torch.testing.assert_close(gradient, 2 * centred / 6)


def test_attention_of_0_has_a_finite_distance_and_gradient() -> None:
    scores = torch.tensor([[[0.0, -1000.0, 1.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.2, 0.3, 0.5]]])
    for distance in (attention_score_mse, attention_kl):
        value = distance(scores.softmax(-1), teacher).sum()
        assert value.isfinite()
        assert torch.autograd.grad(value, scores)[0].isfinite().all()


def expected(measure: AttentionLoss, inputs: LossInputs, family: Family, *, per_head: bool) -> Tensor:
    """Query by query: half the weight to each row that is trained, in equal parts on its real tokens."""
    prefix = "" if family == "decoder-only" else f"{measure.config.stack}_"
    total = torch.zeros(())
    width = inputs.rows.prompt_ids.shape[1]
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        places = {
            "decoder-only": range(width - len(prompt), width + len(completion)),
            "encoder-decoder": range(len(prompt if measure.config.stack == "encoder" else completion)),
        }[family]
        for layer in (0, 1):
            for query in places if completion else ():
                keys = places if measure.config.stack == "encoder" else range(places[0], query + 1)
                maps = [
                    item.outputs[f"{prefix}attentions"][layer][row, :, query, keys]
                    for item in (inputs.student, inputs.teacher)
                    if item is not None
                ]
                if not per_head:
                    maps = [item.mean(0, keepdim=True) for item in maps]
                for s, t in zip(*maps, strict=True):
                    total = total + plain(measure.config.loss, s, t) / (2 * len(places) * len(maps[0]) * 2)
    return total


def plain(loss: str, student: Tensor, teacher: Tensor) -> Tensor:
    if loss == "kl":
        return torch.nn.functional.kl_div(student.log(), teacher, reduction="sum")
    return (student.log() - teacher.log()).var(unbiased=False)


@pytest.mark.parametrize("loss", ("mse", "kl"))
@pytest.mark.parametrize("heads", (4, 2))
@pytest.mark.parametrize(("family", "stack"), CASES)
def test_value_and_gradients_are_those_of_a_plain_formula(
    family: Family, stack: StackName, heads: int, loss: Loss
) -> None:
    models = pair(family, heads)
    measure = attention_loss("uniform", loss, stack)
    inputs = seen(*models, rows(family), "attentions")
    value = build_module(measure, models)(inputs)
    other = expected(measure, inputs, family, per_head=heads == 4)
    torch.testing.assert_close(value.float(), other, rtol=1e-4, atol=1e-6)
    assert value > 1e-2
    trainable = list(models[0].parameters())
    ours, theirs = (
        torch.autograd.grad(item, trainable, retain_graph=True, allow_unused=True) for item in (value, other)
    )
    for mine, theirs_too in zip(ours, theirs, strict=True):
        assert (mine is None) == (theirs_too is None)
        if mine is not None and theirs_too is not None:
            torch.testing.assert_close(mine, theirs_too, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "stack"), CASES)
def test_padding_changes_nothing(family: Family, stack: StackName) -> None:
    models = pair(family)
    module = build_module(attention_loss(stack=stack), models)
    batch = rows(family)
    values = [module(seen(*models, item, "attentions")) for item in (batch, longer(batch, 3))]
    torch.testing.assert_close(*values)


# ---- where there are no maps ----


def test_an_attention_that_gives_no_maps_is_refused() -> None:
    student, teacher = pair("decoder-only")
    teacher.set_attn_implementation("sdpa")
    message = "the teacher's attn_implementation is 'sdpa', which gives no maps: load it with .*='eager'"
    with pytest.raises(ValueError, match=message):
        attention_loss().create_module(student.config, teacher.config, 0)


def test_a_decoder_in_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float64.*fp32"):
        enable_attention_maps(tiny_model("decoder-only", 7))
    enable_attention_maps(tiny_model("encoder-decoder", 7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [[0, 1]]}, "layer 0.*student.*1 to 2"),
        ({"loss": "cosine"}, "loss: 'cosine' .*mse, kl"),
        ({"stack": "encoder"}, "stack 'encoder': LlamaConfig"),
    ],
)
def test_what_cannot_be_matched_is_refused(fields: dict[str, Any], message: str) -> None:
    student, teacher = (model.config for model in pair("decoder-only"))
    with pytest.raises(ValueError, match=message):
        (term,) = parse([{"type": "attentions", **fields}])
        term.loss.create_module(student, teacher, 0)  # type: ignore[union-attr]


# ---- in the trainer ----

LOSSES: tuple[WeightedLosses, ...] = (
    (WeightedLoss(Divergence(beta=0.1)), WeightedLoss(attention_loss("last_1", "kl"), 0.5)),
    (WeightedLoss(attention_loss("uniform"), 0.01),),
    (WeightedLoss(Divergence(beta=0.1)),),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_packed_are_those_cells_alone(family: Family, tmp_path: Path) -> None:
    """To the rounding of float32, in which transformers' eager attention takes its softmax."""
    cells = [cell(tmp_path, str(n), lmbda=0.5, objectives=terms) for n, terms in enumerate(LOSSES)]

    run = distil(tmp_path, family, cells, **load_float32_models(family, len(cells)))
    for n, cell_arguments in enumerate(cells):
        alone = distil(
            tmp_path / "alone", family, [cell_arguments], packed=False, **load_float32_models(family, 1)
        )
        assert_close(run.weights(n), alone.weights(), atol=2e-5)
        for row, other in zip(run.history[n], alone.history[0], strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert all(row["loss/attentions"] > 0 for row in run.history[0])


def load_float32_models(family: Family, students: int) -> dict[str, Any]:
    """Models that give maps, trained for three steps."""
    models = [tiny_model(family, 7, dtype=torch.float32) for _ in range(students)]
    teacher = tiny_model(family, 3, width=32, dtype=torch.float32)
    for model in (*models, teacher):
        enable_attention_maps(model)
    return {"students": models, "teacher": teacher, "dtype": torch.float32, "max_steps": 3}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", (True, False))
def test_models_as_they_are_loaded_hand_out_their_maps(family: Family, packed: bool, tmp_path: Path) -> None:
    terms = parse([{"beta": 0.1}, {"type": "attentions", "weight": 0.5}])
    cells = [cell(tmp_path, str(n), objectives=terms) for n in range(2 if packed else 1)]
    students = [tiny_model(family, 7, dtype=torch.float32) for _ in cells]
    assert {model.config._attn_implementation for model in students} == {"sdpa"}
    run = distil(tmp_path, family, cells, packed=packed, students=students, dtype=torch.float32)
    assert all(row["loss/attentions"] > 0 for row in run.history[0])


@pytest.mark.parametrize("loss", (attention_score_mse, attention_kl))
def test_a_probability_near_zero_counts_and_its_gradient_is_finite(loss: Callable[..., Tensor]) -> None:
    scores = torch.tensor([[[0.0, -60.0, -80.0, -95.0]]], requires_grad=True)
    uniform = torch.full((1, 1, 4), 0.25)
    value = loss(scores.softmax(-1), uniform)
    value.sum().backward()
    exact = loss(scores.detach().double().softmax(-1), uniform.double())
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    assert scores.grad is not None and scores.grad.isfinite().all()
