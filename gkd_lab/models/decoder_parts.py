"""Find the modules of a Llama-like decoder, for a decode step that computes with their weights itself.

A model qualifies by its structure, not by its name: exactly these modules, no other parameter, nothing that
changes a module's output from outside, and no rule that a short comparison of logits could not show (a
sliding window, positions that depend on the length). `fused_check` then compares the numbers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from gkd_lab.models.packed_layers import PackedLinear, PackedModule

MODEL_CHILDREN = frozenset({"model", "lm_head"})
DECODER_CHILDREN = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
LAYER_CHILDREN = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
ATTENTION_CHILDREN = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
HEAD_NORMS = frozenset({"q_norm", "k_norm"})
MLP_CHILDREN = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the batch."""
HARMLESS_HOOKS = ("transformers.utils.output_capturing", "gkd_lab.models.packed_layers")
"""Modules whose hooks change no output: transformers' own, and those of a packed T5."""


LinearModule = nn.Linear | PackedLinear


class CannotFuse(ValueError):
    """Raised for a model whose decode step has no fused form; the message has the reason."""


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer; head norms are None where the model has none."""

    input_norm: nn.Module
    query: LinearModule
    key: LinearModule
    value: LinearModule
    output: LinearModule
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    mlp_norm: nn.Module
    gate: LinearModule
    up: LinearModule
    down: LinearModule
    activation: nn.Module
    scaling: float


@dataclass(frozen=True)
class CommonParts:
    """The modules and sizes that every fused decoder has: `n_heads` heads of attention of `head_width`."""

    embedding: nn.Module
    final_norm: nn.Module
    head: LinearModule
    n_heads: int
    head_width: int
    norm_epsilon: float


@dataclass(frozen=True)
class DecoderParts(CommonParts):
    """The modules and sizes of a Llama-like decoder, whose heads share `n_kv_heads` keys."""

    layers: tuple[LayerParts, ...]
    rotary: nn.Module
    n_kv_heads: int


def find_decoder_parts(model: PreTrainedModel, n_positions: int) -> DecoderParts:
    """Return the modules of a Llama-like model; CannotFuse with the reason for any other.

    `n_positions`: tokens of the longest row, prompt and completion.
    """
    check_model(model)
    check_children("it", model, MODEL_CHILDREN)
    decoder, config = model.get_decoder(), model.config.get_text_config(decoder=True)
    check_children("the decoder", decoder, DECODER_CHILDREN)
    _check_positions(config, n_positions)
    layers = tuple(_find_layer_parts(layer) for layer in decoder.layers)
    key_width = layers[0].key.out_features
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parts = DecoderParts(
        embedding=decoder.embed_tokens,
        layers=layers,
        final_norm=decoder.norm,
        rotary=decoder.rotary_emb,
        head=check_linear("lm_head", model.get_output_embeddings()),
        n_heads=config.num_attention_heads,
        n_kv_heads=key_width // head_width,
        head_width=head_width,
        norm_epsilon=config.rms_norm_eps,
    )
    check_parameters(model, _list_modules(parts))
    return parts


def read_weight(module: nn.Module) -> Tensor:
    """Return a module's weight with a cell axis first, (K, ...), of the selected cells; K = 1 unpacked."""
    if isinstance(module, PackedModule):
        return module.get_active_weight().detach()
    return module.get_parameter("weight").detach()[None]


def read_bias(module: LinearModule) -> Tensor | None:
    """Return a linear layer's bias with a cell axis first, (K, O); None without one."""
    if isinstance(module, PackedModule):
        bias = module.get_active_tensor("bias")
        return None if bias is None else bias.detach()
    return None if module.bias is None else module.bias.detach()[None]


# ---- structure ----


def _find_layer_parts(layer: nn.Module) -> LayerParts:
    """Return the modules of one layer; CannotFuse if it has others."""
    check_children("a layer", layer, LAYER_CHILDREN)
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    norms = HEAD_NORMS if "q_norm" in dict(attention.named_children()) else frozenset()
    check_children("attention", attention, ATTENTION_CHILDREN | norms)
    check_children("an MLP", mlp, MLP_CHILDREN)
    return LayerParts(
        input_norm=layer.input_layernorm,  # type: ignore[arg-type]
        query=check_linear("q_proj", attention.q_proj),
        key=check_linear("k_proj", attention.k_proj),
        value=check_linear("v_proj", attention.v_proj),
        output=check_linear("o_proj", attention.o_proj),
        query_norm=attention.q_norm if norms else None,
        key_norm=attention.k_norm if norms else None,
        mlp_norm=layer.post_attention_layernorm,  # type: ignore[arg-type]
        gate=check_linear("gate_proj", mlp.gate_proj),
        up=check_linear("up_proj", mlp.up_proj),
        down=check_linear("down_proj", mlp.down_proj),
        activation=mlp.act_fn,
        scaling=attention.scaling,
    )


def check_model(model: Any) -> None:
    """Raise CannotFuse for a replaced `generate` and for modules that something else changes."""
    if "generate" in vars(model) or type(model).generate is not GenerationMixin.generate:
        raise CannotFuse("its `generate` is replaced")
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(hook, "__module__", None) not in HARMLESS_HOOKS for hook in hooks):
            raise CannotFuse(f"{name or 'it'} has a forward hook")
        if "forward" in vars(module):
            raise CannotFuse(f"the forward function of {name or 'it'} is replaced")


def check_children(owner: str, module: nn.Module, expected: frozenset[str]) -> None:
    """Raise CannotFuse unless the module's children have exactly these names."""
    names = {name for name, _ in module.named_children()}
    difference = sorted(names ^ expected)
    if difference:
        raise CannotFuse(
            f"{owner} is built differently: {difference[0]!r} is {_describe_side(difference[0], names)}"
        )


def _describe_side(name: str, names: set[str]) -> str:
    """Return whether a differing name is an additional or a missing module."""
    return "an additional module" if name in names else "missing"


def check_linear(name: str, module: Any) -> LinearModule:
    """Return a linear layer with plain floating-point weights; CannotFuse for any other module."""
    if type(module) not in (nn.Linear, PackedLinear):
        raise CannotFuse(f"{name} is a {type(module).__name__}")
    weight = module.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise CannotFuse(f"the weight of {name} is a {type(weight).__name__} of {weight.dtype}")
    if weight.is_meta or weight.numel() == 0:
        raise CannotFuse(f"the weight of {name} is on another device or process")
    checked: LinearModule = module
    return checked


def _check_positions(config: Any, n_positions: int) -> None:
    """Raise CannotFuse for a window shorter than the text and for rotary frequencies that change with it."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise CannotFuse(f"its layers are {', '.join(sorted(kinds))}")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < n_positions:
        raise CannotFuse(f"its sliding window of {window} is shorter than {n_positions} tokens")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in FIXED_ROPE_TYPES:
        raise CannotFuse(f"its rotary embedding is {rope_type}, whose frequencies may change with the length")


def check_parameters(model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
    """Raise CannotFuse if a parameter of the model is in none of `modules`, or on another device."""
    read = {id(p) for module in modules for p in module.parameters(recurse=False)}
    devices = set[torch.device]()
    for name, parameter in model.named_parameters():
        devices.add(parameter.device)
        if id(parameter) not in read:
            raise CannotFuse(f"its parameter {name!r} is not read by a fused decode step")
    if len(devices) > 1:
        raise CannotFuse("its weights are on several devices")


def _list_modules(parts: DecoderParts) -> Iterator[nn.Module]:
    """Yield every module with parameters that a decode step reads."""
    yield from (parts.embedding, parts.final_norm, parts.head)
    for layer in parts.layers:
        yield from (module for module in vars(layer).values() if isinstance(module, nn.Module))
