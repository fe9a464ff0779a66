"""Each check of a pair passes on sound models and fails on the fault that it is there for."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses import step_loss
from gkd_lab.losses.cell_losses import CellLosses
from gkd_lab.losses.step_loss import count_trained_items
from gkd_lab.selfcheck import checks
from gkd_lab.selfcheck.bench import ModelPair, PairBench
from gkd_lab.selfcheck.checks import BFLOAT16_CHECK, CHECKS
from gkd_lab.selfcheck.command import MADE_FAMILIES, make_pair
from gkd_lab.selfcheck.invariance import InvarianceResult, create_failed_result
from gkd_lab.training.trainer import GKDTrainer

from .pair_faults import PAIRS, draws_at_random, reads_padding, shares_a_weight

ALL = (*CHECKS, BFLOAT16_CHECK)


@pytest.fixture(scope="module")
def pairs() -> dict[str, ModelPair]:
    return {family: make_pair(family) for family in MADE_FAMILIES}


@pytest.fixture
def pair(pairs: dict[str, ModelPair]) -> ModelPair:
    """A copy to be spoilt, decoder-only."""
    return copy.deepcopy(pairs["decoder-only"])


def findings(bench: PairBench) -> dict[str, InvarianceResult]:
    return {check.name: check(bench) for check in ALL}


def failing(bench: PairBench) -> set[str]:
    return {name for name, finding in findings(bench).items() if not finding.passed}


def finding(name: str, bench: PairBench) -> InvarianceResult:
    (check,) = (check for check in ALL if check.name == name)
    return check(bench)


@pytest.mark.parametrize("family", MADE_FAMILIES)
def test_a_sound_pair_passes_every_check(family: Family, pairs: dict[str, ModelPair], tmp_path: Path) -> None:
    results = findings(PairBench(copy.deepcopy(pairs[family]), tmp_path))
    assert [name for name, result in results.items() if not result.passed] == []
    assert not any("head are not" in result.reason for result in results.values())
    assert list(tmp_path.iterdir()) == []


def test_a_pair_of_one_model_passes_every_check(pair: ModelPair, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="copy of the initial student"):
        bench = PairBench(replace(pair, teacher=pair.student), tmp_path)
    assert failing(bench) == set()


# ---- faults of tokenizer, student and teacher ----


@pytest.mark.parametrize("name", PAIRS)
def test_a_fault_of_the_pair_fails_the_checks_of_it_and_no_other(
    name: str, pair: ModelPair, tmp_path: Path
) -> None:
    spoil, expected = PAIRS[name]
    spoilt = spoil(pair) or pair
    assert failing(PairBench(spoilt, tmp_path)) == expected


def test_an_encoder_that_reads_padding_fails_its_check(pairs: dict[str, ModelPair], tmp_path: Path) -> None:
    pair = copy.deepcopy(pairs["encoder-decoder"])
    reads_padding(pair.student)
    assert failing(PairBench(pair, tmp_path)) == {"student padding"}


def test_a_model_that_draws_random_numbers_while_it_evaluates_fails_all_that_compares(
    pair: ModelPair, tmp_path: Path
) -> None:
    draws_at_random(pair.student)
    failures = failing(PairBench(pair, tmp_path))
    assert {
        "student padding",
        "neighbours",
        "cache",
        "sampling",
        "equal, loss",
        "equal, gradient",
    } <= failures
    assert not failures & {"rows", "teacher head", "teacher padding", "dropout", "prompt", "teacher"}


@pytest.mark.parametrize("side", ("student", "teacher"))
def test_a_nan_weight_is_reported_as_the_reason(side: str, pair: ModelPair, tmp_path: Path) -> None:
    getattr(pair, side).base_model.norm.weight.data[0] = torch.nan
    bench = PairBench(pair, tmp_path)
    assert "NaN" in finding("loss", bench).reason
    for name in (f"{side} padding", "prompt", "accumulation", "on policy", "bfloat16"):
        assert not finding(name, bench).passed


# ---- rotary frequencies that depend on the batch ----


def with_rotary(pair: ModelPair, side: str, tokens: int) -> ModelPair:
    """A Llama in place of one model, whose frequencies change beyond so many tokens."""
    config = LlamaConfig(
        vocab_size=len(pair.tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        pad_token_id=pair.tokenizer.pad_token_id,
        bos_token_id=pair.tokenizer.bos_token_id,
        eos_token_id=pair.tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(10)
    return replace(pair, student=model) if side == "student" else replace(pair, teacher=model)


def test_a_student_with_dynamic_rotary_frequencies_fails_for_them_and_for_no_random_numbers(
    pair: ModelPair, tmp_path: Path
) -> None:
    results = findings(PairBench(with_rotary(pair, "student", 16), tmp_path))
    failures = {name: result.reason for name, result in results.items() if not result.passed}
    assert {"neighbours", "cache", "resume"} <= set(failures)
    assert all("rope_type dynamic" in reason and "16 tokens" in reason for reason in failures.values())
    assert all("student's" in reason for reason in failures.values())


def test_within_their_length_dynamic_rotary_frequencies_pass_with_a_note(
    pair: ModelPair, tmp_path: Path
) -> None:
    results = findings(PairBench(with_rotary(pair, "student", 64), tmp_path))
    assert [name for name, result in results.items() if not result.passed] == []
    assert "64 tokens" in results["rows"].note


def test_a_fault_of_the_other_model_keeps_its_own_reason(pair: ModelPair, tmp_path: Path) -> None:
    reads_padding(pair.student)
    bench = PairBench(with_rotary(pair, "teacher", 16), tmp_path)
    assert "reads padding" in finding("student padding", bench).reason
    assert "rope_type" not in finding("resume", bench).reason


def test_a_student_that_keeps_something_of_the_batch_before_is_not_said_to_draw_random_numbers(
    pair: ModelPair, tmp_path: Path
) -> None:
    lengths = [1]

    def remember(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Scale by the rows of the batch before; single tokens, which `generate` feeds, change nothing."""
        if output.shape[1] == 1:
            return output
        lengths.append(output.shape[0])
        return output * lengths[-2]

    pair.student.base_model.norm.register_forward_hook(remember)
    result = finding("resume", PairBench(pair, tmp_path))
    assert not result.passed
    assert "batch before" in result.reason


# ---- faults of the trainer ----


class EachByItsOwnTokens(GKDTrainer):
    """Each micro-batch is divided by its own tokens, not by those of the step."""

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        samples, items = super().get_batch_samples(*args)
        if self.args.loss_normalization == "token":
            for sample in samples:
                sample["items"] = count_trained_items(sample["batch"], "token")
        return samples, items


class AsLongAsTheReference(GKDTrainer):
    """The student's own text is cut where the data's answer ends."""

    def sample_completions(self, fixed: Any, *args: Any) -> dict[int, Any]:
        length = fixed.completion_mask.sum(-1, keepdim=True)
        return {
            cell: text.replace_completions(text.completion_ids, _until(text.completion_mask, length))
            for cell, text in super().sample_completions(fixed, *args).items()
        }


def _until(mask: Tensor, length: Tensor) -> Tensor:
    return mask * (torch.arange(mask.shape[1], device=mask.device) < length)


class RemembersTheLastStep(GKDTrainer):
    last = 0

    def sample_completions(self, fixed: Any, writing: Any, place: Any, *args: Any) -> dict[int, Any]:
        before, self.last = self.last, place.step
        return super().sample_completions(fixed, writing, replace(place, step=place.step + before), *args)


def learns(bench: PairBench) -> None:
    bench.teacher.requires_grad_(True)


def scaled(side: str) -> Callable[[PairBench], None]:
    """A configuration that speaks of a factor which the model does not apply."""

    def spoil(bench: PairBench) -> None:
        getattr(bench, side).config.logit_scale = 2.0

    return spoil


def trained_by(kind: type) -> Callable[[PairBench], None]:
    def spoil(bench: PairBench) -> None:
        bench.trainer.__class__ = kind

    return spoil


TRAINERS: dict[str, tuple[Callable[[PairBench], None], set[str]]] = {
    "the teacher learns": (learns, {"teacher"}),
    "student's logits x 2": (scaled("student"), {"student head", "loss"}),
    "teacher's logits x 2": (scaled("teacher"), {"teacher head", "loss"}),
    "own divisor": (trained_by(EachByItsOwnTokens), {"accumulation"}),
    "length of the reference": (trained_by(AsLongAsTheReference), {"references"}),
    "memory of the last step": (trained_by(RemembersTheLastStep), {"resume"}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_fault_of_the_trainer_fails_the_checks_of_it_and_no_other(
    name: str, pair: ModelPair, tmp_path: Path
) -> None:
    spoil, expected = TRAINERS[name]
    bench = PairBench(pair, tmp_path)
    spoil(bench)
    assert failing(bench) == expected


def twice(losses: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    return 2 * losses


def a_bit_more(losses: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    return losses + 3e-6


def pulls(losses: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    """Nothing is added but a gradient."""
    pull = (hidden.sum(-1) * weights).sum(-1)
    return losses + 0.1 * (pull - pull.detach())


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], set[str]]] = {
    "another scale": (twice, {"loss"}),
    "something added": (a_bit_more, {"equal, loss"}),
    "another gradient": (pulls, {"equal, gradient"}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_fault_of_the_loss_fails_the_checks_of_it_and_no_other(
    name: str, pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, expected = LOSSES[name]
    true = step_loss.compute_cell_losses

    def spoilt(hidden: Tensor, *args: Any, **named: Any) -> CellLosses:
        sums = true(hidden, *args, **named)
        weights = args[-1].to(hidden.dtype)
        return replace(sums, losses=change(sums.losses, hidden, weights))

    monkeypatch.setattr(step_loss, "compute_cell_losses", spoilt)
    assert failing(PairBench(pair, tmp_path)) == expected


def test_every_check_has_a_fault_that_fails_it() -> None:
    caught = set().union(*(names for table in (PAIRS, TRAINERS, LOSSES) for _, names in table.values()))
    assert caught == {check.name for check in ALL}


# ---- findings ----


@pytest.mark.parametrize("order", ((1e-9, torch.nan), (torch.nan, 1e-9)))
def test_no_order_hides_a_nan(order: tuple[float, float]) -> None:
    worst = checks._get_largest_value(order)
    assert worst != worst
    assert not InvarianceResult(worst, 1.0, "").passed


def test_a_finding_at_its_limit_passes_and_one_above_does_not() -> None:
    assert InvarianceResult(0.0, 0.0, "").passed
    assert not InvarianceResult(1, 0, "").passed
    assert not create_failed_result("reason").passed


def test_a_model_that_calls_a_part_of_its_base_is_seen(pair: ModelPair, tmp_path: Path) -> None:
    """OPT's head reads `model.decoder`, so a hook on `model` sees nothing: not seen is not zero."""
    torch.manual_seed(0)
    vocabulary = pair.student.config.vocab_size
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 128}
    config = OPTConfig(vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, **sizes)
    models = [OPTForCausalLM(config).eval() for _ in range(2)]
    opt = replace(pair, student=models[0], teacher=models[1])
    assert finding("prompt", PairBench(opt, tmp_path)).passed


def test_a_pair_that_shares_a_weight_is_refused(pair: ModelPair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the teacher shares 1 weights with the student"):
        PairBench(shares_a_weight(pair) or pair, tmp_path)
