"""The two stacks of layers that a model may have: their sizes, and what a forward pass says of each.

Shapes: B rows, C completion tokens, T positions of a stack.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.config.layer_maps import UNIFORM, LayerMap, LayerPair, parse_layer_map, resolve_layer_pairs
from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss, LossInputs, ModelOutputs

StackName = Literal["decoder", "encoder"]
STACKS: tuple[StackName, ...] = ("decoder", "encoder")
Distance = Callable[[Tensor, Tensor], Tensor]
"""(student's, teacher's) of each token -> how far apart they are."""


@dataclass(frozen=True)
class LayerLoss(AuxiliaryLoss):
    """A measure that compares layers of student and teacher, pair by pair.

    layers: pairs (student's, teacher's) or a rule (`gkd_lab.config.layer_maps`).
    loss: one of `losses`. stack: "decoder" or "encoder" of a model that has both.

    Raises ValueError for what is not one of these.
    """

    distances: ClassVar[Mapping[str, Distance]]
    layers: LayerMap = UNIFORM
    loss: str = "mse"
    stack: StackName = "decoder"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", parse_layer_map(self.layers))
        for name, value, valid in (("loss", self.loss, self.distances), ("stack", self.stack, STACKS)):
            if value not in valid:
                raise build_unknown_name_error(f"{name} of {self.kind}", value, valid)


OF_LAYERS = ("layers", "loss", "stack")
"""Fields of an objective that compares layers, in a configuration."""


def stack_size(
    config: PretrainedConfig, stack: StackName, dimension: Literal["layers", "width", "heads"]
) -> int:
    """One size of a stack.

    Raises:
        ValueError: for the encoder of a model that has one stack, and for a size that is not one number.
    """
    if stack == "encoder" and not config.is_encoder_decoder:
        raise ValueError(
            f"stack 'encoder': {type(config).__name__} has one stack; the nearest valid value is 'decoder'"
        )
    own = config.get_text_config(decoder=stack == "decoder", encoder=stack == "encoder")
    names = [_CONFIG_FIELDS[dimension]]
    if (stack, dimension) == ("decoder", "layers"):
        names.insert(0, "num_decoder_layers")  # T5's, whose num_hidden_layers are the encoder's
    value = next((found for one in names if (found := getattr(own, one, None)) is not None), None)
    if not isinstance(value, int):
        raise ValueError(
            f"{type(config).__name__}.{names[-1]} is {value!r}: {dimension} must be one whole number"
        )
    return value


_CONFIG_FIELDS = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}


def match_layers(
    layers: LayerMap, student: PretrainedConfig, teacher: PretrainedConfig, stack: StackName, *, first: int
) -> tuple[LayerPair, ...]:
    """The pairs of layers that a map means for two models. Raises ValueError for one that is not there."""
    own, guide = (stack_size(config, stack, "layers") for config in (student, teacher))
    return resolve_layer_pairs(layers, own, guide, lowest_layer=first)


def stack_outputs(outputs: ModelOutputs, kind: str, stack: StackName) -> tuple[Tensor, ...]:
    """`hidden_states` or `attentions` of a stack, from the names that transformers gives them."""
    full = f"{stack}_{kind}" if outputs.config.is_encoder_decoder else kind
    return outputs.outputs[full]


def position_weights(inputs: LossInputs, stack: StackName, length: int, *, predictions: bool) -> Tensor:
    """The weight in its cell's loss of each of a stack's `length` positions, (B, T).

    predictions: of those that predict a token which is trained on, its own. Otherwise, and where a stack read
    the text alone, as an encoder and a classifier do: the row's weight in equal parts on its real tokens.
    """
    rows, weights = inputs.rows, inputs.weights
    prompt, completion = rows.prompt_mask.shape[1], weights.shape[1]
    mask = torch.cat([rows.prompt_mask, rows.completion_mask], dim=1)
    if inputs.student.config.is_encoder_decoder and stack == "decoder" and length == completion:
        mask, own = rows.completion_mask, weights
    elif length == prompt + completion:
        own = functional.pad(weights, (prompt - 1, 1))
    else:
        return _spread_row_weights(rows.prompt_mask, weights)
    return own if predictions else _spread_row_weights(mask, weights)


def _spread_row_weights(mask: Tensor, weights: Tensor) -> Tensor:
    """(B, T), (B, C) -> (B, T)."""
    real = mask.to(weights)
    return real * (weights.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1))


def widen_dtype(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
