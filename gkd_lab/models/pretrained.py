"""Load pretrained models from a checkpoint folder, the hub or a GGUF file, and drop some of their layers."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gkd_lab.config.artifact_specs import Family, ModelSpec
from gkd_lab.config.errors import ConfigError
from gkd_lab.models.build import load_model, load_tokenizer
from gkd_lab.models.heads import mark_untied_head


def load_pretrained(
    spec: ModelSpec, family: Family, precision: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load (model, tokenizer) from the spec's folder, hub name or GGUF file; apply its `keep_layers`.

    ConfigError: a tokenizer without pad and end token, which could neither fill up batches nor end texts.
    """
    location = spec.path or spec.pretrained
    assert location is not None
    path, is_gguf = Path(location), location.endswith(".gguf")
    folder = str(path.parent) if is_gguf else location
    arguments: dict[str, Any] = {"gguf_file": path.name} if is_gguf else {}
    if not spec.path:
        arguments["revision"] = spec.revision
    # No setting of transformers turns off its progress bar for GGUF files.
    silent = redirect_stderr(StringIO()) if is_gguf else nullcontext()
    with silent:
        model = load_model(folder, family, precision, **arguments)
        tokenizer = load_tokenizer(folder, **arguments)
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"the tokenizer of {location} has neither a pad nor an end token: set eos_token in its "
            "tokenizer_config.json"
        )
    model = _drop_quantization(model) if is_gguf else model
    return (model if spec.keep_layers is None else keep_layers(model, spec.keep_layers)), tokenizer


def _drop_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Return a trainable copy of a model from GGUF, whose config is no longer marked as quantized."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return _build_model(type(model), config, model.state_dict(), model)


def keep_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """Return a copy of a model with only these layers of each stack; a number means evenly spaced ones.

    Args:
        layers: Indices of the layers to keep, or their number, evenly spaced from first to last.

    Raises:
        ConfigError: for layers out of range or out of order, and for dropping an encoder-decoder's first
            layer, which holds T5's relative position bias.
    """
    stacks = {
        name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1
    }
    depth = model.config.num_hidden_layers
    indices = _resolve_layer_indices(layers, depth)
    if indices[0] != 0 and model.config.is_encoder_decoder:
        raise ConfigError(
            f"keep_layers {list(indices)}: the first layer, 0, holds T5's bias and must be kept"
        )
    state = {}
    for name, value in model.state_dict().items():
        stack = next((s for s in stacks if stacks[s] == depth and name.startswith(f"{s}.")), None)
        if stack is None:
            state[name] = value
            continue
        layer, _, parameter = name[len(stack) + 1 :].partition(".")
        if int(layer) in indices:
            state[f"{stack}.{indices.index(int(layer))}.{parameter}"] = value
    return _build_model(type(model), _shorten_config(model.config, indices), state, model)


def _resolve_layer_indices(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the layer indices to keep, evenly spaced if `layers` is a number; ConfigError if invalid."""
    if isinstance(layers, int):
        if layers > depth:
            raise ConfigError(f"keep_layers {layers}: the model has {depth} layers")
        return tuple(round(x) for x in torch.linspace(0, depth - 1, layers, dtype=torch.float64).tolist())
    indices = tuple(layers)
    if list(indices) != sorted(set(indices)) or not indices or indices[-1] >= depth:
        raise ConfigError(
            f"keep_layers {list(indices)}: list layers from 0 to {depth - 1} in ascending order"
        )
    return indices


_DEPTH_FIELDS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def _shorten_config(config: Any, layers: Sequence[int]) -> Any:
    """Return a copy of a config whose depth fields and `layer_types` describe only these layer indices."""
    depth, short = config.num_hidden_layers, copy.deepcopy(config)
    for name in _DEPTH_FIELDS:
        if getattr(config, name, None) == depth:
            setattr(short, name, len(layers))
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and name == "layer_types":
            setattr(short, name, [value[n] for n in layers])
    return short


def _build_model(kind: type, config: Any, state: dict[str, Any], like: PreTrainedModel) -> PreTrainedModel:
    """Build a `kind` from config and weights, in eval mode, with dtype and generation settings of `like`."""
    model: PreTrainedModel = kind(config).to(like.dtype)
    mark_untied_head(model)
    model.load_state_dict(state)
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.eval()
