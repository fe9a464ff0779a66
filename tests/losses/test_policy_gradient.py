"""The policy gradient of Eq. 5: against the true gradient of the expected reward, and in the trainer."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.fused_loss import compute_cell_losses
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.policy_gradient import ProcessGroup, compute_advantages, reinforce_scales
from gkd_lab.losses.step_loss import token_weights
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses
from gkd_lab.models.projection import Projection
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.pack_trainer import AllCellsFailed

from ..models.tiny import FAMILIES, PAD, tiny_examples, tiny_model, tiny_tokenizer
from ..training.driving import Run, Stopped, assert_close, assert_identical, cell, distil, stop_at
from .descriptions import parse, reward_loss

ALONE = ProcessGroup()
BASELINES = [("leave_one_out", False), ("none", False)]
SOFT = WeightedLoss(Divergence(beta=0.9), 0.25)


def rewarded(name: str = "rougeL", weight: float = 0.75, **more: Any) -> WeightedLoss:
    return WeightedLoss(reward_loss(name, **more), weight)


# ---- the gradient, on a policy whose expectations can be written out ----

END = 0
TEXTS = [(END,), *((first, second) for first in (1, 2) for second in range(3))]
"""Everything that a policy over three tokens can write that stops at END or after two."""
REWARDS = torch.tensor([0.3, 1.0, 0.0, 2.0, 0.5, 0.0, 0.7], dtype=torch.float64)


def policy() -> Tensor:
    """Logits of the first token, and of the second one after 1 and after 2, (3, 3)."""
    return torch.tensor([[0.2, -0.4, 1.0], [0.5, 0.1, -1.0], [0.0, 2.0, 0.3]], dtype=torch.float64)


def probability(logits: Tensor, text: Sequence[int]) -> Tensor:
    logs = logits.log_softmax(-1)
    places = [0, *text[:-1]]
    return torch.stack([logs[place, token] for place, token in zip(places, text, strict=True)]).sum().exp()


def loss_on(logits: Tensor, chosen: Sequence[int], normalization: str, baseline: str, normalize: bool) -> Any:
    """The term as the trainer computes it, on a step of these texts."""
    texts = [TEXTS[n] for n in chosen]
    labels = torch.tensor([[*text, PAD][:2] for text in texts])
    mask = torch.tensor([[1, len(text) - 1] for text in texts])
    weights = token_weights(mask[None], normalization)[0]
    items = (mask.sum() if normalization == "token" else torch.tensor(len(texts))).double()
    each = compute_advantages(REWARDS[list(chosen)], baseline, normalize, ALONE)
    scale = reinforce_scales(each, mask, items, len(texts), normalization)
    hidden = torch.stack([torch.stack([logits[0], logits[text[0]]]) for text in texts])
    return compute_cell_losses(
        hidden.flatten(0, 1)[None],
        Projection(None),
        None,
        None,
        (0,),
        [reward_loss("rougeL")],
        (weights / items).flatten()[None],
        labels=labels.flatten()[None],
        scales={(0, 0): scale.flatten()},
    ).losses[0]


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize(("baseline", "normalize"), BASELINES)
def test_in_expectation_it_is_the_gradient_of_the_expected_reward(
    normalization: str, baseline: str, normalize: bool
) -> None:
    """Over all steps of two texts, each weighed by its probability under the policy."""
    logits = policy().requires_grad_()
    of_text = torch.stack([probability(logits, text) for text in TEXTS])
    (true,) = torch.autograd.grad((of_text * REWARDS).sum(), logits)
    assert of_text.sum().item() == pytest.approx(1, abs=1e-12)
    estimate = torch.zeros_like(true)
    for chosen in itertools.product(range(len(TEXTS)), repeat=2):
        (gradient,) = torch.autograd.grad(loss_on(logits, chosen, normalization, baseline, normalize), logits)
        estimate += of_text.detach()[list(chosen)].prod() * gradient
    torch.testing.assert_close(estimate, -true, rtol=0, atol=1e-12)


def test_the_gradient_on_a_bandit_has_its_closed_form() -> None:
    """d E[r] / d z_k = q_k (r_k - E[r]), without anything of ours."""
    logits, rewards = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64), [1.0, 0.0, 0.25]
    q = logits.softmax(-1)
    mean = sum(p * r for p, r in zip(q.tolist(), rewards, strict=True))
    known = [-p * (r - mean) for p, r in zip(q.tolist(), rewards, strict=True)]
    found = torch.zeros_like(q)
    measure = reward_loss("rougeL")
    for action, reward in enumerate(rewards):
        _, gradient, _ = measure.value_and_gradient(logits[None], torch.tensor([action]))
        found += q[action] * reward * gradient[0]
    torch.testing.assert_close(found, torch.tensor(known, dtype=torch.float64))


def test_both_normalizations_give_one_gradient_step_by_step() -> None:
    logits = policy().requires_grad_()
    for chosen in ((0, 1, 4), (0, 0, 6), (2, 3, 5)):
        (one,), (other,) = (
            torch.autograd.grad(loss_on(logits, chosen, kind, "leave_one_out", True), logits)
            for kind in ("sequence", "token")
        )
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
        assert one.norm() > 0.01


# ---- advantages ----


def test_the_leave_one_out_baseline_is_the_mean_of_the_other_rewards() -> None:
    rewards = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([1 - 2.0, 0 - 2.5, 4 - 0.5], dtype=torch.float64)
    torch.testing.assert_close(compute_advantages(rewards, "leave_one_out", False, ALONE), expected)
    spread = (((1 - 5 / 3) ** 2 + (5 / 3) ** 2 + (4 - 5 / 3) ** 2) / 3) ** 0.5
    torch.testing.assert_close(compute_advantages(rewards, "leave_one_out", True, ALONE), expected / spread)
    assert compute_advantages(rewards, "none", False, ALONE).tolist() == [1, 0, 4]


@pytest.mark.parametrize("normalize", (False, True))
def test_equal_rewards_and_a_single_reward_have_no_gradient(normalize: bool) -> None:
    for rewards in (torch.full((7,), 0.1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)):
        assert compute_advantages(rewards, "leave_one_out", normalize, ALONE).abs().max() < 1e-12


def test_the_other_ranks_are_others_too() -> None:
    """Two ranks, as one of them sees it: the sums of both."""
    here, there = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([4.0, 3.0], dtype=torch.float64)
    everyone = compute_advantages(torch.cat([here, there]), "leave_one_out", False, ALONE)
    ranks = ProcessGroup(2, lambda sums: sums + torch.tensor([2.0, 7.0], dtype=torch.float64))
    torch.testing.assert_close(compute_advantages(here, "leave_one_out", False, ranks), everyone[:2])


# ---- in the trainer ----


def packed_cells(folder: Path) -> list[CellArguments]:
    """Two rewards in one cell, another seed, one that is not rewarded at all."""
    lists: list[WeightedLosses] = [
        (SOFT, rewarded()),
        (SOFT, rewarded("exact_match", 0.3), rewarded("rouge2", 0.2, normalize=True)),
        (WeightedLoss(Divergence(beta=0.1)),),
    ]
    return [
        cell(folder, str(n), lmbda=1.0 - 0.4 * n, seed=n % 2, objectives=terms)
        for n, terms in enumerate(lists)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_with_others_equals_alone(family: Any, tmp_path: Path) -> None:
    run = distil(tmp_path, family, packed_cells(tmp_path))
    for n, one in enumerate(packed_cells(tmp_path)):
        alone = distil(tmp_path / "alone", family, [one], packed=False)
        assert_close(run.weights(n), alone.weights(), atol=1e-9)
        for row, own in zip(run.history[n], alone.history[0], strict=True):
            assert row.keys() == own.keys()
            assert [row.get(name) for name in ("reward", "reward_2")] == [
                own.get(name) for name in ("reward", "reward_2")
            ]
    earned = [row["reward"] for row in run.history[0]]
    assert len(set(earned)) > 2
    assert all(row["advantage_std"] >= 0 for row in run.history[0])
    assert not any("reward" in row for row in run.history[2])


def test_it_is_logged_on_the_steps_that_the_student_wrote_alone(tmp_path: Path) -> None:
    run = distil(tmp_path, "decoder-only", [cell(tmp_path, lmbda=0.5, objectives=(SOFT, rewarded()))])
    assert {row["on_policy"] for row in run.history[0]} == {0.0, 1.0}
    for row in run.history[0]:
        assert ("reward" in row) == (row["on_policy"] == 1)
        assert (row["loss/reward"] == 0) or row["on_policy"] == 1


@pytest.mark.parametrize("stop", (2, 5))
def test_stopped_and_resumed_equals_straight_bit_for_bit(stop: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "max_steps": 7, "save_strategy": "steps"}
    options["save_steps"] = stop
    straight = distil(tmp_path / "a", "decoder-only", packed_cells(tmp_path / "a"), **options)
    cells = packed_cells(tmp_path / "b")
    with pytest.raises(Stopped):
        distil(tmp_path / "b", "decoder-only", cells, prepare=stop_at(stop), **options)
    place = f"{cells[0].output_dir}/checkpoint-{stop}"
    resumed = distil(tmp_path / "b", "decoder-only", cells, resume=place, **options)
    for n in range(len(cells)):
        assert_identical(resumed.weights(n), straight.weights(n))
        assert resumed.history[n] == straight.history[n][stop:]


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_micro_batches_share_a_baseline_and_change_nothing(normalization: str, tmp_path: Path) -> None:
    terms = (SOFT, rewarded(normalize=True))
    runs = [
        distil(
            tmp_path / str(parts),
            "decoder-only",
            [cell(tmp_path, lmbda=1.0, objectives=terms)],
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            loss_normalization=normalization,
            max_steps=3,
        )
        for parts in (1, 4)
    ]
    assert_close(runs[0].weights(), runs[1].weights())
    for one, other in zip(runs[0].history[0], runs[1].history[0], strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-15)
        assert one["loss/reward"] == pytest.approx(other["loss/reward"], abs=1e-9)


def test_the_reward_alone_does_not_know_the_normalization(tmp_path: Path) -> None:
    one, other = (
        distil(
            tmp_path / kind,
            "decoder-only",
            [cell(tmp_path, lmbda=1.0, objectives=(rewarded(weight=1.0),))],
            loss_normalization=kind,
        )
        for kind in ("sequence", "token")
    )
    assert_close(one.weights(), other.weights(), atol=1e-10)
    moved = [(one.weights()[n] - v).abs().max() for n, v in tiny_model("decoder-only", 7).named_parameters()]
    assert max(moved) > 1e-4


def brevity(prompts: list[str], texts: list[str], references: list[str]) -> list[float]:
    """For a run that must find it by its import path."""
    return [-float(len(text.split())) for text in texts]


HERE = f"{__name__}:"


def test_what_is_rewarded_becomes_more(tmp_path: Path) -> None:
    """Shorter texts of a student that starts with random ones; the divergence alone does not shorten them."""
    options: dict[str, Any] = {"max_steps": 60, "per_device_train_batch_size": 16, "warmup_steps": 0}
    lists = (
        (rewarded(HERE + "brevity", 1.0),),
        (WeightedLoss(Divergence(beta=0.9), 1.0), rewarded("exact_match", 0.0)),
    )
    cells = [
        cell(tmp_path, str(n), lmbda=1.0, learning_rate=3e-3, objectives=terms)
        for n, terms in enumerate(lists)
    ]
    run = distil(
        tmp_path, "decoder-only", cells, lr_scheduler_type="constant", lr_scheduler_kwargs={}, **options
    )
    earned = [row["reward"] for row in run.history[0]]
    lengths = [[row["completion_length"] for row in rows] for rows in run.history]
    first, last = slice(0, 10), slice(-10, None)
    assert sum(earned[last]) / 10 > sum(earned[first]) / 10 + 2
    assert sum(lengths[0][last]) < 0.7 * sum(lengths[0][first])
    assert sum(lengths[1][last]) > 0.9 * sum(lengths[1][first])


def test_a_reward_function_gets_completions_and_references(tmp_path: Path) -> None:
    SEEN.clear()
    cells = [cell(tmp_path, lmbda=1.0, seed=3, objectives=(SOFT, rewarded(HERE + "noted")))]
    run = distil(tmp_path, "decoder-only", cells, max_steps=1)
    ((prompts, texts, references),) = SEEN
    tokenizer = tiny_tokenizer()
    rows = {
        tokenizer.decode(row.prompt_ids): tokenizer.decode(row.completion_ids, skip_special_tokens=True)
        for row in tiny_examples()
    }
    assert [rows[prompt] for prompt in prompts] == references
    assert len(texts) == 8
    assert sum(len(text.split()) for text in texts) / 8 <= run.history[0][0]["completion_length"]


SEEN: list[tuple[list[str], list[str], list[str]]] = []


def noted(prompts: list[str], texts: list[str], references: list[str]) -> list[float]:
    SEEN.append((prompts, texts, references))
    return [0.0] * len(texts)


# ---- rewards that are no numbers ----


def spoilt(prompts: list[str], texts: list[str], references: list[str]) -> list[float]:
    return [float("nan") if row == 2 else 1.0 for row, _ in enumerate(texts)]


def test_a_nan_reward_fails_its_cell_and_no_other(tmp_path: Path) -> None:
    cells = [
        cell(tmp_path, str(n), lmbda=1.0, objectives=(SOFT, rewarded(name)))
        for n, name in enumerate(("rougeL", HERE + "spoilt"))
    ]
    told: list[tuple[int, str]] = []

    def listen(trainer: Any) -> None:
        trainer.on_failure = lambda n, why: told.append((n, why))

    run = distil(tmp_path, "decoder-only", cells, prepare=listen)
    ((n, why),) = told
    assert n == 1
    assert f"'{HERE}spoilt' gave nan for row 2 of 8" in why
    assert why.endswith("at step 1")
    alone = distil(tmp_path / "alone", "decoder-only", cells[:1])
    assert_close(run.weights(0), alone.weights())
    with pytest.raises(AllCellsFailed, match=r"nan .* row 2 of 8"):
        distil(tmp_path / "spoilt", "decoder-only", cells[1:], packed=False)


def test_rows_without_a_completion_cannot_be_compared_with(tmp_path: Path) -> None:
    examples = [replace(row, completion_ids=[]) for row in tiny_examples()]
    with pytest.raises(AllCellsFailed, match=r"completion.* 8 of 8 rows"):
        distil(
            tmp_path, "decoder-only", [cell(tmp_path, lmbda=1.0, objectives=(rewarded(),))], examples=examples
        )
    ours = (rewarded(HERE + "brevity"),)
    distil(
        tmp_path, "decoder-only", [cell(tmp_path, lmbda=1.0, objectives=ours)], examples=examples, max_steps=1
    )


# ---- what cannot be asked for ----


@pytest.mark.parametrize(
    ("changes", "terms", "message"),
    [
        ({"lmbda": 0.0}, (SOFT, rewarded()), "lmbda 0 .*to 1"),
        (
            {"temperature": 0.7},
            (SOFT, rewarded()),
            "got temperature 0.7",
        ),
        ({"lmbda": 0.5}, (rewarded(),), "lmbda 0.5 takes"),
    ],
)
def test_a_reward_needs_on_policy_text(
    changes: dict[str, Any], terms: WeightedLosses, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        cell(tmp_path, **{"lmbda": 1.0, **changes}, objectives=terms)


def test_with_cross_entropy_the_other_steps_have_something_to_teach(tmp_path: Path) -> None:
    made = cell(tmp_path, lmbda=0.5, objectives=(rewarded(), WeightedLoss(CrossEntropy(), 0.5)))
    assert [term.weight for term in made.list_terms(on_policy=True)] == [0.75, 0.0]
    assert [term.weight for term in made.list_terms(on_policy=False)] == [0.0, 0.5]


def test_a_configuration_names_its_reward(tmp_path: Path) -> None:
    listed = [{"beta": 0.9, "weight": 0.25}, {"type": "reward", "name": "rouge2", "weight": 0.75}]
    config = GKDConfig(
        output_dir=str(tmp_path), lmbda=1.0, temperature=1.0, objectives=listed, bf16=False, use_cpu=True
    )
    terms = CellArguments.build(config).objectives
    assert terms == (WeightedLoss(Divergence(beta=0.9), 0.25), rewarded("rouge2"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name is missing"),
        ({"name": "rouge3"}, "'rouge3'; .*'rouge"),
        ({"name": "entailment"}, "give `model`"),
        ({"name": "rouge2", "model": "x"}, "'rouge2' .*got 'x'"),
        ({"name": "rouge2", "baseline": "mean"}, "baseline: 'mean' .*leave_one_out"),
        ({"name": "rouge2", "baseline": "none", "normalize": True}, "baseline 'none' leaves"),
        ({"name": "rouge2", "alpha": 1}, "alpha'; .*name, model"),
    ],
)
def test_a_reward_that_is_not_understood_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([{"type": "reward", **fields}])


def test_on_policy_evaluation_leaves_the_reward_out(tmp_path: Path) -> None:
    """Its loss is that of the divergence."""
    found = []
    for terms in ((SOFT,), (SOFT, rewarded())):
        run: Run = distil(
            tmp_path,
            "decoder-only",
            [cell(tmp_path, lmbda=1.0, learning_rate=0.0, objectives=terms)],
            max_steps=1,
            eval_on_policy=True,
            per_device_eval_batch_size=8,
        )
        found.append(run.trainer.evaluate(tiny_examples(8))["eval_on_policy_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert found[0] > 0


def test_each_reward_function_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    from gkd_lab.losses import policy_gradient

    found: Callable[..., Any] = policy_gradient.load_reward_function

    def counted(name: str, *rest: Any) -> Any:
        asked.append(name)
        return found(name, *rest)

    monkeypatch.setattr(policy_gradient, "load_reward_function", counted)
    distil(
        tmp_path,
        "decoder-only",
        [cell(tmp_path, str(n), lmbda=1.0, objectives=(SOFT, rewarded())) for n in range(3)],
        max_steps=1,
    )
    assert asked == ["rougeL"]
