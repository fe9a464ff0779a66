"""Refuse packs of models whose code mixes rows or whose members differ."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from gkd_lab.encoding.batches import collate_examples
from gkd_lab.models.forward import compute_completion_logits
from gkd_lab.models.packing import CannotPack, Pack

from .families import make
from .tiny import PAD, tiny_examples


class Averaging(LlamaForCausalLM):
    """A model whose logits depend on the other rows of the batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * output.logits.mean(0)
        return output


class Forgetful(LlamaForCausalLM):
    """A model whose logits depend on the other rows of the batch once it has a cache."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.logits.shape[1] == 1 and kwargs.get("past_key_values") is not None:
            output.logits = output.logits.roll(1, 0)
        return output


class OwnPositions(GPT2LMHeadModel):
    """A model that ignores the positions that it is given."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def copy_as_class(name: str, kind: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    model = make(name, seed)
    changed = kind(model.config).to(model.dtype)
    changed.load_state_dict(model.state_dict())
    return changed


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    (
        (
            "llama",
            Averaging,
            r"logits .*Averaging .*\de-",
        ),
        ("llama", Forgetful, "generated logits .*Forgetful"),
        (
            "gpt2",
            OwnPositions,
            r"OwnPositions .*ValueError: .*\(1",
        ),
    ),
)
def test_model_code_that_mixes_rows_is_refused(name: str, kind: type[PreTrainedModel], reason: str) -> None:
    model = copy_as_class(name, kind)
    with pytest.raises(CannotPack, match=reason):
        Pack.build([model] * 3)


def test_members_that_differ_only_in_their_logits_are_refused() -> None:
    alone = [make("llama", seed) for seed in range(2)]
    alone[1].model.norm.variance_epsilon = 1.0
    with pytest.raises(CannotPack, match=r"logits .*LlamaForCausalLM .* \de"):
        Pack.build(alone)


def test_members_share_their_buffers_or_do_not_pack() -> None:
    alone = [make("llama", seed) for seed in range(2)]
    for model in alone:
        model.register_buffer("languages", torch.tensor([3.0, 1.0, 4.0]))
    state = Pack.build(alone).unpack_cell(1).state_dict()
    assert state.keys() == alone[1].state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in alone[1].state_dict().items())
    alone[1].languages[0] = 2.0
    with pytest.raises(CannotPack, match=r"model 1 .*buffer 'languages'"):
        Pack.build(alone)


@pytest.mark.parametrize("broken", (0, 2))
def test_a_member_with_nan_weights_packs_with_the_others(broken: int) -> None:
    alone = [make("llama", seed) for seed in range(3)]
    next(alone[broken].parameters()).data.fill_(torch.nan)
    pack, rows = Pack.build(alone), collate_examples(tiny_examples(12), PAD, is_encoder_decoder=False)
    logits = compute_completion_logits(pack.model, rows)
    for cell, cell_logits in enumerate(logits.chunk(3)):
        assert bool(cell_logits.isnan().any()) == (cell == broken)


def test_members_keep_their_mode_and_their_generation_config() -> None:
    alone = [make("llama", seed).train() for seed in range(2)]
    alone[0].model.layers[1].eval()
    configs = [model.generation_config.to_dict() for model in alone]
    modes = [[m.training for m in model.modules()] for model in alone]
    state = torch.get_rng_state()
    pack = Pack.build(alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert [[m.training for m in model.modules()] for model in alone] == modes
    assert [model.generation_config.to_dict() for model in (*alone, pack.model)] == [*configs, configs[0]]
    assert not pack.model.model.layers[1].mlp.training
    assert pack.model.model.layers[0].mlp.training


def test_running_out_of_memory_is_not_reported_as_a_model_that_cannot_pack() -> None:
    class Hungry(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        Pack.build([copy_as_class("llama", Hungry)])
