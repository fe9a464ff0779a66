"""Encoder and decoder stacks of a model: their sizes, their recorded outputs, weights of their positions.

Shapes: B rows, C completion tokens, T positions of a stack.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from gkd_lab.config.layer_maps import LayerMap, LayerPair, resolve_layer_pairs
from gkd_lab.losses.auxiliary_losses import LossInputs, ModelOutputs

StackName = Literal["decoder", "encoder"]
Distance = Callable[[Tensor, Tensor], Tensor]
"""(student's, teacher's) of each token -> their distance."""
_CONFIG_FIELDS = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}


def stack_size(
    config: PretrainedConfig, stack: StackName, dimension: Literal["layers", "width", "heads"]
) -> int:
    """Return a stack's number of layers, hidden width or number of heads, read from the configuration.

    Raises:
        ValueError: for the encoder of a model that has one stack, and for a size that is not one number.
    """
    if stack == "encoder" and not config.is_encoder_decoder:
        raise ValueError(
            f"stack 'encoder': {type(config).__name__} has one stack; the nearest valid value is 'decoder'"
        )
    stack_config = config.get_text_config(decoder=stack == "decoder", encoder=stack == "encoder")
    names = [_CONFIG_FIELDS[dimension]]
    if (stack, dimension) == ("decoder", "layers"):
        names.insert(0, "num_decoder_layers")  # T5's, whose num_hidden_layers are the encoder's
    sizes = [getattr(stack_config, name, None) for name in names]
    value = next((size for size in sizes if size is not None), None)
    if not isinstance(value, int):
        raise ValueError(
            f"{type(config).__name__}.{names[-1]} is {value!r}: {dimension} must be one whole number"
        )
    return value


def match_layers(
    layers: LayerMap, student: PretrainedConfig, teacher: PretrainedConfig, stack: StackName, *, first: int
) -> tuple[LayerPair, ...]:
    """Return the (student layer, teacher layer) pairs that a layer map means for these two models.

    first: the lowest layer that a pair may name. Raises ValueError for a missing layer.
    """
    student_layers, teacher_layers = (stack_size(config, stack, "layers") for config in (student, teacher))
    return resolve_layer_pairs(layers, student_layers, teacher_layers, lowest_layer=first)


def stack_outputs(outputs: ModelOutputs, kind: str, stack: StackName) -> tuple[Tensor, ...]:
    """Return a stack's recorded `hidden_states` (embeddings first) or `attentions`, one per layer."""
    name = f"{stack}_{kind}" if outputs.config.is_encoder_decoder else kind
    return outputs.outputs[name]


def position_weights(inputs: LossInputs, stack: StackName, length: int, *, predictions: bool) -> Tensor:
    """Return (B, T): each position's loss weight, its predicted token's or an even share of its row's.

    predictions: a position that predicts a trained token has this token's weight, all others 0. Otherwise,
    and where a stack reads the prompt alone, as encoders and classifiers do, a row's weight is spread evenly
    over its real tokens.
    """
    rows, weights = inputs.rows, inputs.weights
    prompt, completion = rows.prompt_mask.shape[1], weights.shape[1]
    mask = rows.joined_mask
    if inputs.student.config.is_encoder_decoder and stack == "decoder" and length == completion:
        mask, prediction_weights = rows.completion_mask, weights
    elif length == prompt + completion:
        prediction_weights = functional.pad(weights, (prompt - 1, 1))
    else:
        return _spread_row_weights(rows.prompt_mask, weights)
    return prediction_weights if predictions else _spread_row_weights(mask, weights)


def _spread_row_weights(mask: Tensor, weights: Tensor) -> Tensor:
    """Return (B, T): each row's total weight divided evenly among the mask's positions, 0 elsewhere.

    mask: (B, T). weights: (B, C).
    """
    real = mask.to(weights)
    return real * (weights.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1))


def widen_dtype(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
