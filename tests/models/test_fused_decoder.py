"""A fused decoder computes the model's own logits, alone and packed, or the model samples with `generate`."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
)

from gkd_lab.models.decoder_parts import CannotFuse
from gkd_lab.models.forward import Sequences, compute_completion_logits
from gkd_lab.models.fused_check import build_fused_decoder, compute_forced_logits, find_parts
from gkd_lab.models.packing import Pack

from .families import SPREAD, decoder, make
from .tiny import LAST_WORD, tiny_model

POSITIONS = 20


def randomize(model: PreTrainedModel, seed: int, start: float = 0.0) -> PreTrainedModel:
    """Return the model with random weights; the mean of those of norms is `start`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, start if parameter.dim() == 1 else 0.0, SPREAD, generator)
    return model.eval()


def gemma(seed: int) -> PreTrainedModel:
    return randomize(GemmaForCausalLM(GemmaConfig(**decoder(16, head_dim=8))), seed)


def llama_with_biases(seed: int) -> PreTrainedModel:
    config = LlamaConfig(**decoder(16, attention_bias=True, mlp_bias=True))
    return randomize(LlamaForCausalLM(config), seed)


def llama_with_scaled_positions(seed: int) -> PreTrainedModel:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    return randomize(LlamaForCausalLM(LlamaConfig(**decoder(16, rope_parameters=rope))), seed, 1.0)


def granite(seed: int) -> PreTrainedModel:
    """Llama's modules, with factors that only its code shows."""
    factors = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0}
    return randomize(GraniteForCausalLM(GraniteConfig(**decoder(16), **factors)), seed, 1.0)


def t5_tied(seed: int) -> PreTrainedModel:
    """Without gates, and with a scaled output."""
    return tiny_model("encoder-decoder", seed, dtype=torch.float32).eval()


def mistral(window: int) -> PreTrainedModel:
    return randomize(MistralForCausalLM(MistralConfig(**decoder(16), sliding_window=window)), 0, 1.0)


BUILDERS: dict[str, Any] = {
    **{
        name: lambda seed, name=name: make(name, seed, dtype=torch.float32)
        for name in ("llama", "qwen2", "qwen3", "t5")
    },
    **{build.__name__: build for build in (gemma, llama_with_biases, llama_with_scaled_positions, t5_tied)},
}


def make_rows(cells: int, rows: int = 3, *, is_encoder_decoder: bool = False) -> Sequences:
    """Random rows of 5 prompt tokens, padded on the model's side, and 6 completion tokens."""
    ids = torch.randint(LAST_WORD, (rows * cells, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1::3, slice(3, 5) if is_encoder_decoder else slice(2)] = 0
    mask[2::3, slice(1, 5) if is_encoder_decoder else slice(4)] = 0
    return Sequences(ids[:, :5], mask[:, :5], ids[:, 5:], mask[:, 5:])


def force(model: PreTrainedModel, rows: Sequences) -> Tensor:
    fused = build_fused_decoder(model, POSITIONS)
    assert fused is not None
    return compute_forced_logits(fused, rows)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_logits_token_by_token_are_those_of_the_model_s_forward(name: str, dtype: torch.dtype) -> None:
    model = BUILDERS[name](0).to(dtype)
    rows = make_rows(1, is_encoder_decoder=model.config.is_encoder_decoder)
    expected, logits = compute_completion_logits(model, rows), force(model, rows)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_a_pack_s_rows_get_the_logits_of_their_members(name: str) -> None:
    members = [BUILDERS[name](seed) for seed in range(3)]
    pack = Pack.build(members)
    rows = make_rows(1, is_encoder_decoder=members[0].config.is_encoder_decoder)
    expected = torch.cat([compute_completion_logits(member, rows) for member in members])
    logits = force(pack.model, rows.repeat_rows(3))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with pack.select_cells([2, 0]) as model:
        selected_logits = force(model, rows.repeat_rows(2))
    torch.testing.assert_close(selected_logits, logits[[6, 7, 8, 0, 1, 2]], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
@torch.no_grad()
def test_autocast_multiplies_in_its_dtype_as_accurately_as_the_model(name: str) -> None:
    model = make(name, 0, width=32, dtype=torch.float32)
    rows = make_rows(1, is_encoder_decoder=name == "t5")
    exact = compute_completion_logits(model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        model_logits, fused = compute_completion_logits(model, rows), build_fused_decoder(model, POSITIONS)
    assert fused is not None
    assert fused.dtype == torch.bfloat16
    error, model_error = (
        (logits - exact).abs().mean() for logits in (compute_forced_logits(fused, rows), model_logits)
    )
    assert 0 < error < 1.5 * model_error


@torch.no_grad()
def test_half_precision_weights_are_compared_in_float32_and_multiplied_in_their_own() -> None:
    model, rows = make("qwen3", 0, width=32, dtype=torch.bfloat16), make_rows(1)
    exact = compute_completion_logits(copy.deepcopy(model).float(), rows)
    fused = build_fused_decoder(model, POSITIONS)
    assert fused is not None
    assert fused.dtype == torch.bfloat16
    model_error = (compute_completion_logits(model, rows) - exact).abs().mean()
    assert (compute_forced_logits(fused, rows) - exact).abs().mean() < 1.5 * model_error


@torch.no_grad()
def test_each_call_reads_the_weights_as_they_are() -> None:
    model, rows = make("llama", 0, dtype=torch.float32), make_rows(1)
    before = force(model, rows)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    after = force(model, rows)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, compute_completion_logits(model, rows), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_the_first_vocabulary_entries_are_projected() -> None:
    model, rows = make("llama", 0, dtype=torch.float32), make_rows(1)
    fused = build_fused_decoder(model, POSITIONS, vocabulary=9)
    assert fused is not None
    torch.testing.assert_close(compute_forced_logits(fused, rows), force(model, rows)[..., :9])


# ---- models without a fused form ----


def with_hook() -> PreTrainedModel:
    model = make("llama", 0)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def with_replaced_forward() -> PreTrainedModel:
    model = make("llama", 0)
    norm = model.model.norm
    norm.forward = norm.forward
    return model


def with_own_generate() -> PreTrainedModel:
    model = make("llama", 0)
    model.generate = model.generate
    return model


def with_extra_parameter() -> PreTrainedModel:
    model = make("llama", 0)
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    return model


def with_integer_weights() -> PreTrainedModel:
    model = make("llama", 0)
    head = model.model.layers[0].mlp.up_proj
    head.weight = nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    return model


def with_rope(rope_type: str) -> PreTrainedModel:
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**decoder(16, rope_parameters=rope)))


def t5_with(**fields: Any) -> PreTrainedModel:
    model = make("t5", 0)
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "bart": (lambda: make("bart", 0), "it is built differently"),
    "olmo": (lambda: OlmoForCausalLM(OlmoConfig(**decoder(16))), "rms_norm_eps"),
    "forced": (lambda: t5_with(forced_bos_token_id=4), "first token is forced"),
    "start": (lambda: t5_with(decoder_start_token_id=None), "decoder_start_token_id"),
    "gpt2": (lambda: make("gpt2", 0), "'model' is missing"),
    "gemma2": (lambda: make("gemma2", 0), "sliding_attention"),
    "gemma3": (lambda: make("gemma3", 0), "sliding_attention"),
    "experts": (lambda: make("qwen2_moe", 0), "an MLP"),
    "window": (lambda: mistral(POSITIONS - 1), "window of 19 is shorter than 20"),
    "rope": (lambda: with_rope("dynamic"), "dynamic"),
    "hook": (with_hook, "layers.1.mlp has a forward hook"),
    "forward": (with_replaced_forward, "model.norm is replaced"),
    "generate": (with_own_generate, "`generate` is replaced"),
    "parameter": (with_extra_parameter, "'model.layers.0.self_attn.sinks'"),
    "integers": (with_integer_weights, "up_proj .*int8$"),
    "meta": (lambda: make("llama", 0).to("meta"), "another device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_structures_are_refused_with_the_reason(name: str) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(CannotFuse, match=reason):
        find_parts(build(), POSITIONS)
    assert build_fused_decoder(build(), POSITIONS) is None


@torch.no_grad()
def test_a_window_as_long_as_the_text_changes_nothing() -> None:
    model, rows = mistral(POSITIONS), make_rows(1)
    torch.testing.assert_close(
        force(model, rows), compute_completion_logits(model, rows), rtol=1e-4, atol=1e-4
    )


def test_transformers_own_hooks_are_no_obstacle() -> None:
    model, rows = make("llama", 0), make_rows(1)
    model(rows.prompt_ids, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert build_fused_decoder(model, POSITIONS) is not None


def test_a_model_of_the_same_structure_with_other_arithmetic_is_found_once_by_its_logits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = granite(0)
    find_parts(model, POSITIONS)
    with caplog.at_level(logging.WARNING):
        assert build_fused_decoder(model, POSITIONS) is None
        assert build_fused_decoder(model, POSITIONS) is None
    (message,) = caplog.messages
    assert "GraniteForCausalLM" in message
    assert "logits of a fused decode step differ from its own" in message


def test_another_structure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make("gpt2", 0)
    with caplog.at_level(logging.INFO, "gkd_lab"):
        assert build_fused_decoder(model, POSITIONS) is None
        assert build_fused_decoder(model, POSITIONS) is None
    (message,) = caplog.messages
    assert message.startswith(
        "GPT2LMHeadModel samples with transformers' `generate`: it is built differently"
    )


def test_rounding_in_a_deep_model_is_no_difference() -> None:
    config = decoder(64, num_hidden_layers=30, initializer_range=0.3)
    torch.manual_seed(0)
    assert build_fused_decoder(LlamaForCausalLM(LlamaConfig(**config)).eval(), POSITIONS) is not None


def test_a_model_is_compared_once() -> None:
    """The comparison runs the model's own forward pass; later calls do not."""
    model, calls = make("llama", 0), []
    forward = type(model).forward

    class Counted(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **more: Any) -> Any:
            calls.append(1)
            return forward(self, *args, **more)

    model.__class__ = Counted
    for _ in range(3):
        assert build_fused_decoder(model, POSITIONS) is not None
    assert len(calls) == 1
