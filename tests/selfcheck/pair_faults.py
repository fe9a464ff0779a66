"""Faults of a tokenizer, student or teacher, and the checks that each of them fails."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from gkd_lab.selfcheck.bench import ModelPair

PairFault = Callable[[ModelPair], Any]


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
