"""Each check of a pair passes on sound models and fails on the fault that it is there for."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    OPTConfig,
    OPTForCausalLM,
    TemperatureLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses import step_loss
from gkd_lab.losses.cell_losses import CellLosses
from gkd_lab.losses.step_loss import count_trained_items
from gkd_lab.selfcheck import checks
from gkd_lab.selfcheck.bench import ModelPair, PairBench
from gkd_lab.selfcheck.checks import BFLOAT16_CHECK, CHECKS, InvarianceResult
from gkd_lab.selfcheck.command import MADE_FAMILIES, make_pair
from gkd_lab.training.trainer import GKDTrainer

ALL = (*CHECKS, BFLOAT16_CHECK)
PairFault = Callable[[ModelPair], Any]


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


def counts_its_turns(pair: ModelPair) -> None:
    """The prompt's text depends on whether an answer follows."""
    pair.tokenizer.chat_template = (
        "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )


def adds_to_logits(model: Any) -> None:
    """A bias that no configuration and no head tells of."""
    bias = torch.linspace(0, 2, model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda module, args, output: output + bias.to(output.device))


def reads_padding(model: Any) -> None:
    def unmasked(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        mask = named["attention_mask"]
        # `generate` gives none where there is no padding.
        return args, {**named, "attention_mask": None if mask is None else torch.ones_like(mask)}

    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    body.register_forward_pre_hook(unmasked, with_kwargs=True)


def compares_rows(model: Any) -> None:
    model.base_model.norm.register_forward_hook(lambda module, args, output: output - output.mean(0) / 2)


def loses_its_place(model: Any) -> None:
    """Positions that go wrong as soon as there is a cache."""

    def moved(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        cache = named.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            return None
        return args, {**named, "position_ids": named["position_ids"] + 3}

    model.base_model.register_forward_pre_hook(moved, with_kwargs=True)


def with_own_temperature(model: Any, temperature: Callable[[int], float]) -> None:
    """A `generate` that samples at the temperature which it gives to so many rows."""
    generate = model.generate

    def warmed(**named: Any) -> Any:
        warper = TemperatureLogitsWarper(temperature(len(named["input_ids"])))
        named["logits_processor"] = LogitsProcessorList([warper])
        return generate(**named)

    model.generate = warmed


def writes_colder(model: Any) -> None:
    with_own_temperature(model, lambda rows: 0.3)


def writes_colder_alone(model: Any) -> None:
    with_own_temperature(model, lambda rows: 0.3 if rows == 1 else 1.0)


def writes_by_mood(model: Any) -> None:
    """Random numbers that no seed of the trainer reaches."""
    mood = random.Random(0)
    with_own_temperature(model, lambda rows: mood.uniform(0.2, 0.8))


def cannot_write(model: Any) -> None:
    def generate(**named: Any) -> Any:
        raise AttributeError("this model has nothing to generate with")

    model.generate = generate


def gives_no_number_back(model: Any) -> None:
    """The loss is fine, one gradient is not."""
    model.base_model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)


def never_evaluates(model: Any) -> None:
    norm = model.base_model.norm
    norm.train = lambda mode=True: norm


def draws_at_random(model: Any) -> None:
    """As dropout does that eval mode does not switch off."""
    model.base_model.norm.register_forward_hook(
        lambda module, args, output: nn.functional.dropout(output, 0.1, training=True)
    )


def rounds_away(model: Any) -> None:
    """What is added and taken away again costs half precision all of its digits."""

    def lifted(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        identity = torch.eye(output.shape[-1], device=output.device)
        return nn.functional.linear(output, identity, identity.new_full((len(identity),), 300.0)) - 300

    model.base_model.norm.register_forward_hook(lifted)


class Leaks(LlamaForCausalLM):
    """Logits as ever, but each one's gradient reaches every position."""

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **named: Any
    ) -> CausalLMOutputWithPast:
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **named
        )
        hidden = self.passed_on(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=output.past_key_values)

    def passed_on(self, hidden: Tensor) -> Tensor:
        return hidden + (hidden - hidden.detach()).mean(1, keepdim=True)


class Deaf(Leaks):
    """Nothing below the head learns."""

    def passed_on(self, hidden: Tensor) -> Tensor:
        return hidden.detach()


class HardOfHearing(Leaks):
    """One of the answer's positions learns nothing."""

    def passed_on(self, hidden: Tensor) -> Tensor:
        third_last = torch.arange(hidden.shape[1], device=hidden.device) == hidden.shape[1] - 3
        return torch.where(third_last[:, None], hidden.detach(), hidden)


def of_class(kind: type) -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        model.__class__ = kind

    return spoil


def student(spoil: Callable[[Any], None]) -> PairFault:
    return lambda pair: spoil(pair.student)


def teacher(spoil: Callable[[Any], None]) -> PairFault:
    return lambda pair: spoil(pair.teacher)


def shares_a_weight(pair: ModelPair) -> ModelPair:
    twin = copy.deepcopy(pair.student)
    twin.base_model.norm.weight = pair.student.base_model.norm.weight
    return replace(pair, teacher=twin)


def counts_padding(pair: ModelPair) -> ModelPair:
    """A GPT-2 that counts positions from the left edge of a batch; Llama would not notice the shift."""
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = GPT2Config(vocab_size=len(pair.tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=64, **ids)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for weight in model.parameters():
        weight.data.mul_(10)
    model.base_model.register_forward_pre_hook(
        lambda module, args, named: (args, {**named, "position_ids": None}), with_kwargs=True
    )
    return replace(pair, student=model)


PAIRS: dict[str, tuple[PairFault, set[str]]] = {
    "template tells whether an answer follows": (counts_its_turns, {"rows"}),
    "hidden bias, student": (student(adds_to_logits), {"student head"}),
    "hidden bias, teacher": (teacher(adds_to_logits), {"teacher head"}),
    "padding is read, student": (student(reads_padding), {"student padding"}),
    "padding is read, teacher": (teacher(reads_padding), {"teacher padding"}),
    "positions count padding": (counts_padding, {"student padding"}),
    "rows are compared": (student(compares_rows), {"neighbours", "accumulation", "on policy"}),
    "positions of the cache": (student(loses_its_place), {"cache", "sampling"}),
    "own temperature": (student(writes_colder), {"sampling"}),
    "own temperature of single rows": (student(writes_colder_alone), {"on policy"}),
    "own random numbers": (student(writes_by_mood), {"sampling", "on policy", "references", "resume"}),
    "no generate": (
        student(cannot_write),
        {"cache", "sampling", "dropout", "on policy", "references", "resume"},
    ),
    "a module that never evaluates": (student(never_evaluates), {"dropout"}),
    "gradient leaks to other positions": (student(of_class(Leaks)), {"prompt"}),
    "no gradient below the head": (student(of_class(Deaf)), {"prompt"}),
    "no gradient at one position": (student(of_class(HardOfHearing)), {"prompt"}),
    "gradient is NaN": (student(gives_no_number_back), {"accumulation", "on policy"}),
    "precision is needed": (student(rounds_away), {"bfloat16"}),
}


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
                sample["items"] = count_trained_items(sample["batch"], 1, "token")
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
    assert not checks.create_failed_result("reason").passed


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
