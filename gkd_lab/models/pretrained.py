"""Weights that somebody has trained: a checkpoint folder, a hub name or a GGUF file; and smaller copies.

L: layers of a stack.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gkd_lab.config.artifact_specs import Family, ModelSpec
from gkd_lab.config.errors import ConfigError
from gkd_lab.models.build import PRECISION_DTYPES, hide_progress_bars
from gkd_lab.models.heads import mark_untied_head


def load_pretrained(
    spec: ModelSpec, family: Family, precision: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model that a spec names at its revision, with the layers that it keeps, and its tokenizer."""
    place = spec.path or spec.pretrained
    assert place is not None
    auto = AutoModelForCausalLM if family == "decoder-only" else AutoModelForSeq2SeqLM
    given = {**_build_gguf_arguments(place), **({} if spec.path else {"revision": spec.revision})}
    folder = given.pop("folder", place)
    # Of a GGUF file transformers shows a bar that no setting of its own turns off.
    silent = redirect_stderr(StringIO()) if "gguf_file" in given else nullcontext()
    with hide_progress_bars(), silent:
        model = auto.from_pretrained(
            folder, dtype=PRECISION_DTYPES[precision], trust_remote_code=False, **given
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **given)
    mark_untied_head(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    plain = _drop_quantization(model) if "gguf_file" in given else model
    return (plain if spec.keep_layers is None else keep_layers(plain, spec.keep_layers)), tokenizer


def _build_gguf_arguments(location: str) -> dict[str, Any]:
    """What `from_pretrained` needs besides for a GGUF file."""
    path = Path(location)
    if path.suffix != ".gguf":
        return {}
    return {"folder": str(path.parent), "gguf_file": path.name}


def _drop_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """transformers takes a model out of a GGUF file for a quantized one, which cannot be trained or saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return _build_model(type(model), config, model.state_dict(), model)


def keep_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A smaller copy: these layers of every stack, or so many of them, evenly spaced from first to last.

    Raises:
        SpecError: for a layer that is not there or out of order, and for a first layer that must stay, as
            in T5, where it holds the bias by position.
    """
    stacks = {
        name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1
    }
    depth = model.config.num_hidden_layers
    chosen = _choose_layers(layers, depth)
    if chosen[0] != 0 and model.config.is_encoder_decoder:
        raise ConfigError(f"keep_layers {list(chosen)}: the first layer, 0, holds T5's bias and must be kept")
    state = {}
    for name, value in model.state_dict().items():
        stack = next((s for s in stacks if stacks[s] == depth and name.startswith(f"{s}.")), None)
        if stack is None:
            state[name] = value
            continue
        layer, _, rest = name[len(stack) + 1 :].partition(".")
        if int(layer) in chosen:
            state[f"{stack}.{chosen.index(int(layer))}.{rest}"] = value
    return _build_model(type(model), _shorten_config(model.config, chosen), state, model)


def _choose_layers(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    if isinstance(layers, int):
        if layers > depth:
            raise ConfigError(f"keep_layers {layers}: the model has {depth} layers")
        return tuple(round(x) for x in torch.linspace(0, depth - 1, layers, dtype=torch.float64).tolist())
    chosen = tuple(layers)
    if list(chosen) != sorted(set(chosen)) or not chosen or chosen[-1] >= depth:
        raise ConfigError(
            f"keep_layers {list(chosen)}: give layers of 0 to {depth - 1} in their order, each once"
        )
    return chosen


_DEPTH_FIELDS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def _shorten_config(config: Any, layers: Sequence[int]) -> Any:
    """The configuration of a model with these layers; entries that list the layers one by one shrink too."""
    depth, short = config.num_hidden_layers, copy.deepcopy(config)
    for name in _DEPTH_FIELDS:
        if getattr(config, name, None) == depth:
            setattr(short, name, len(layers))
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and name == "layer_types":
            setattr(short, name, [value[n] for n in layers])
    return short


def _build_model(kind: type, config: Any, state: dict[str, Any], like: PreTrainedModel) -> PreTrainedModel:
    """A new model of a configuration with these weights, in the dtype of another."""
    made: PreTrainedModel = kind(config).to(like.dtype)
    mark_untied_head(made)
    made.load_state_dict(state)
    made.generation_config = copy.deepcopy(like.generation_config)
    return made.eval()
