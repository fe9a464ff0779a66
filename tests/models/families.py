"""Build a tiny random model of each supported family, all with one vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gkd_lab.models.heads import mark_untied_head

from .tiny import END, LAST_WORD, PAD

VOCABULARY = LAST_WORD + 1
LONGEST = 64
SPREAD = 0.4
"""Standard deviation of the weights: enough for the next token to depend on what came before."""

IDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": None,
}


def decoder(width: int, **more: Any) -> dict[str, Any]:
    """Configuration fields that Llama and later decoders share."""
    return {
        **IDS,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LONGEST,
        "attention_dropout": 0.0,
        **more,
    }


def gemma(width: int, **more: Any) -> dict[str, Any]:
    """Configuration fields of Gemma, with a window shorter than the longest rows in one of two layers."""
    layers = ["sliding_attention", "full_attention"]
    return decoder(
        width,
        head_dim=width // 4,
        query_pre_attn_scalar=width // 4,
        sliding_window=8,
        layer_types=layers,
        final_logit_softcapping=3.0,
        **more,
    )


def llama(width: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**decoder(width, tie_word_embeddings=False)))


def qwen2(width: int) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**decoder(width, tie_word_embeddings=True)))


def qwen3(width: int) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**decoder(width, head_dim=width // 4, tie_word_embeddings=True)))


def gpt2(width: int) -> PreTrainedModel:
    """A GPT-2, with absolute positions."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(**IDS, n_embd=width, n_layer=2, n_head=4, n_positions=LONGEST, **no_dropout)
    )


def gemma2(width: int) -> PreTrainedModel:
    """A Gemma 2, with soft-capped logits and attention; only eager attention applies the latter."""
    config = Gemma2Config(**gemma(width, attn_logit_softcapping=2.0))
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def gemma3(width: int) -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**gemma(width)))


def t5(width: int) -> PreTrainedModel:
    """A T5 v1.1: relative bias, gated, unscaled decoder output, untied head."""
    config = T5Config(
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        # This only sets `scale_decoder_outputs=False`; the model is tied all the same.
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, width))
    mark_untied_head(model)
    return model


def bart_like(config: type, width: int, **more: Any) -> Any:
    """A configuration with absolute positions in encoder and decoder."""
    return config(
        **IDS,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=LONGEST,
        dropout=0.0,
        forced_eos_token_id=None,
        **more,
    )


def bart(width: int) -> PreTrainedModel:
    """A BART, with a bias that is added to its logits."""
    model = BartForConditionalGeneration(bart_like(BartConfig, width, decoder_start_token_id=END))
    model.final_logits_bias.normal_()
    return model


def mbart(width: int) -> PreTrainedModel:
    """An mBART: layer norms come first, and the decoder starts with a language token, here the last word."""
    model = MBartForConditionalGeneration(bart_like(MBartConfig, width, decoder_start_token_id=LAST_WORD))
    model.final_logits_bias.normal_()
    return model


def qwen2_moe(width: int) -> PreTrainedModel:
    """A mixture of experts with a load-balancing loss."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    widths = {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    config = decoder(width, router_aux_loss_coef=0.01, **experts, **widths)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**config))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    build.__name__: build for build in (llama, qwen2, qwen3, gpt2, gemma2, gemma3, t5, bart, mbart, qwen2_moe)
}
DECODERS = ("llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "qwen2_moe")


SINGLE = ("gemma2", "qwen2_moe")
"""Families in float32: eager attention computes its softmax in float32, where a float64 padding mask is NaN;
grouped products of experts take no float64.
"""


def make(name: str, seed: int, width: int = 16, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a model of the family `name` in eval mode, with random weights, biases and norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[name](width).eval()
        for parameter in model.parameters():
            # The mean is a norm's initial value, 1, or 0 for a norm that adds 1 to its weight.
            start = float(parameter.detach().mean().round()) if parameter.dim() == 1 else 0.0
            nn.init.normal_(parameter, start, SPREAD * (16 / width) ** 0.5)
    return model.to(dtype or (torch.float32 if name in SINGLE else torch.float64))
