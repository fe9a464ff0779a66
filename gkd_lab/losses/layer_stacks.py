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

from gkd_lab.config.errors import unknown
from gkd_lab.config.layer_maps import UNIFORM, LayerMap, Pair, layer_map, pairs_of
from gkd_lab.losses.auxiliary_losses import Pass, Seen, StepMeasure

Name = Literal["decoder", "encoder"]
STACKS: tuple[Name, ...] = ("decoder", "encoder")
Distance = Callable[[Tensor, Tensor], Tensor]
"""(student's, teacher's) of each token -> how far apart they are."""


@dataclass(frozen=True)
class OfLayers(StepMeasure):
    """A measure that compares layers of student and teacher, pair by pair.

    layers: pairs (student's, teacher's) or a rule (`gkd_lab.config.layer_maps`).
    loss: one of `losses`. stack: "decoder" or "encoder" of a model that has both.

    Raises ValueError for what is not one of these.
    """

    losses: ClassVar[Mapping[str, Distance]]
    layers: LayerMap = UNIFORM
    loss: str = "mse"
    stack: Name = "decoder"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_map(self.layers))
        for name, value, valid in (("loss", self.loss, self.losses), ("stack", self.stack, STACKS)):
            if value not in valid:
                raise unknown(f"{name} of {self.kind}", value, valid)


OF_LAYERS = ("layers", "loss", "stack")
"""Fields of an objective that compares layers, in a configuration."""


def size(config: PretrainedConfig, name: Name, of: Literal["layers", "width", "heads"]) -> int:
    """One size of a stack.

    Raises:
        ValueError: for the encoder of a model that has one stack, and for a size that is not one number.
    """
    if name == "encoder" and not config.is_encoder_decoder:
        raise ValueError(
            f"stack 'encoder': {type(config).__name__} has one stack; the nearest valid value is 'decoder'"
        )
    own = config.get_text_config(decoder=name == "decoder", encoder=name == "encoder")
    names = [_SIZES[of]]
    if (name, of) == ("decoder", "layers"):
        names.insert(0, "num_decoder_layers")  # T5's, whose num_hidden_layers are the encoder's
    value = next((found for one in names if (found := getattr(own, one, None)) is not None), None)
    if not isinstance(value, int):
        raise ValueError(f"{type(config).__name__}.{names[-1]} is {value!r}: {of} must be one whole number")
    return value


_SIZES = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}


def matched(
    layers: LayerMap, student: PretrainedConfig, teacher: PretrainedConfig, name: Name, *, first: int
) -> tuple[Pair, ...]:
    """The pairs of layers that a map means for two models. Raises ValueError for one that is not there."""
    own, guide = (size(config, name, "layers") for config in (student, teacher))
    return pairs_of(layers, own, guide, first=first)


def recorded(seen: Pass, kind: str, name: Name) -> tuple[Tensor, ...]:
    """`hidden_states` or `attentions` of a stack, from the names that transformers gives them."""
    full = f"{name}_{kind}" if seen.config.is_encoder_decoder else kind
    return seen.outputs[full]


def weights_at(seen: Seen, name: Name, length: int, *, predictions: bool) -> Tensor:
    """The weight in its cell's loss of each of a stack's `length` positions, (B, T).

    predictions: of those that predict a token which is trained on, its own. Otherwise, and where a stack read
    the text alone, as an encoder and a classifier do: the row's weight in equal parts on its real tokens.
    """
    rows, weights = seen.rows, seen.weights
    prompt, completion = rows.prompt_mask.shape[1], weights.shape[1]
    mask = torch.cat([rows.prompt_mask, rows.completion_mask], dim=1)
    if seen.student.config.is_encoder_decoder and name == "decoder" and length == completion:
        mask, own = rows.completion_mask, weights
    elif length == prompt + completion:
        own = functional.pad(weights, (prompt - 1, 1))
    else:
        return _spread(rows.prompt_mask, weights)
    return own if predictions else _spread(mask, weights)


def _spread(mask: Tensor, weights: Tensor) -> Tensor:
    """(B, T), (B, C) -> (B, T)."""
    real = mask.to(weights)
    return real * (weights.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1))


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
