"""Matching of attention maps: where the student looks is drawn to where its teacher looks, layer by layer.

TinyBERT's attention-based distillation (Jiao et al. 2020) and the attention transfer of MiniLM (Wang et al.
2020). Shapes: B rows, h heads, Q queries, T keys, N queries that count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gkd_lab.config.layer_maps import LayerPair
from gkd_lab.losses.auxiliary_losses import AuxiliaryModule, LossInputs
from gkd_lab.losses.layer_stacks import (
    Distance,
    LayerLoss,
    match_layers,
    position_weights,
    stack_outputs,
    stack_size,
    widen_dtype,
)
from gkd_lab.models.classifiers import get_classifier_kind

EAGER_ATTENTION = "eager"
"""transformers' only implementation of attention that hands its maps out."""

LOG_GRADIENT_MARGIN = 2.0**16
"""How far above the smallest normal number a probability has to be for its logarithm to have a gradient."""


def score_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the scores before the softmax, (N, h, T), (N, h, T) -> (N, h): TinyBERT's.

    The scores are read back from the maps, as their logarithms less the mean over the keys: up to a number
    added to all scores of a query, which changes no map. Keys to which either map gives exactly 0 (masked,
    outside of a window, dropped) are left out.
    """
    read = (student > 0) & (teacher > 0)
    count = read.sum(-1).clamp_min(1)
    differences = _log_with_bounded_gradient(student, read) - _log_with_bounded_gradient(teacher, read)
    centred = differences - (differences.sum(-1) / count)[..., None]
    return torch.where(read, centred, 0).square().sum(-1) / count


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each query's map, (N, h, T), (N, h, T) -> (N, h): MiniLM's.

    Keys to which either map gives exactly 0 are left out.
    """
    read = (student > 0) & (teacher > 0)
    return (
        teacher * (_log_with_bounded_gradient(teacher, read) - _log_with_bounded_gradient(student, read))
    ).sum(-1)


def _log_with_bounded_gradient(maps: Tensor, mask: Tensor) -> Tensor:
    """Logarithm where a key is read, 0 elsewhere, without a gradient there.

    Nor has a probability one that is so small that the logarithm's gradient, 1 / p, times what comes back to
    it leaves the dtype's range (1e-33 in float32): infinity here is NaN behind the softmax.
    """
    finite = maps > torch.finfo(maps.dtype).tiny * LOG_GRADIENT_MARGIN
    return torch.where(mask, torch.where(finite, maps, maps.detach()), 1).log()


ATTENTION_DISTANCES: Mapping[str, Distance] = {"mse": score_error, "kl": attention_kl}


@dataclass(frozen=True)
class AttentionLoss(LayerLoss):
    """The mean over pairs of layers and over heads of the distance between self-attention maps.

    Every real token of a row that is trained on counts as a query, prompt included, as in the sources: maps
    of the prompt are what the completion is read from. They share their row's weight in the loss. Numbers of
    heads that differ: the mean of the maps over the heads of each model is compared.

    There is no layer 0. loss: "mse": of the scores, TinyBERT's; "kl": of the maps, MiniLM's.
    """

    kind: ClassVar[str] = "attentions"
    required_outputs: ClassVar[tuple[str, ...]] = ("attentions",)
    distances: ClassVar[Mapping[str, Distance]] = ATTENTION_DISTANCES

    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> AuxiliaryModule:
        """Raises ValueError for a layer or a stack that is not there, and for a model that gives no maps."""
        assert teacher is not None, "attention maps are matched with a teacher's"
        pairs = match_layers(self.layers, student, teacher, self.stack, first=1)
        for role, config in {"student": student, "teacher": teacher}.items():
            if config._attn_implementation != EAGER_ATTENTION:
                raise ValueError(
                    f"attentions: the {role}'s attn_implementation is {config._attn_implementation!r}, which "
                    f"gives no maps: load it with attn_implementation={EAGER_ATTENTION!r}"
                )
        heads = [stack_size(config, self.stack, "heads") for config in (student, teacher)]
        return AttentionModule(self, pairs, per_head=heads[0] == heads[1])


def enable_attention_maps(model: PreTrainedModel) -> None:
    """Let a model, which is not wrapped, hand out its attention maps from now on.

    Raises:
        ValueError: if it cannot, and for a decoder that writes in float64.
    """
    pads_on_the_left = not model.config.is_encoder_decoder and get_classifier_kind(model) is None
    if model.dtype == torch.float64 and pads_on_the_left:
        # transformers' eager softmax is in float32, where float64's mask is -inf: NaN where all is masked.
        raise ValueError(
            "attentions: transformers' eager attention gives NaN beside padding in float64: use fp32"
        )
    model.set_attn_implementation(EAGER_ATTENTION)


class AttentionModule(AuxiliaryModule):
    """A cell's matching of attention maps; it has nothing to learn."""

    def __init__(self, loss: AttentionLoss, pairs: Sequence[LayerPair], *, per_head: bool) -> None:
        super().__init__()
        self.loss, self.pairs, self.per_head = loss, tuple(pairs), per_head

    def forward(self, inputs: LossInputs) -> Tensor:
        """Distance of the matched layers' maps, (): per query, weighted, the mean over heads and pairs."""
        assert inputs.teacher is not None, "attention maps are matched with a teacher's"
        measure = self.loss
        students, teachers = (
            stack_outputs(one, measure.kind, measure.stack) for one in (inputs.student, inputs.teacher)
        )
        every = position_weights(inputs, measure.stack, students[0].shape[2], predictions=False)
        kept = every > 0
        total = every.new_zeros(())
        for own, guide in self.pairs:
            maps = (
                self._select_query_maps(students[own - 1], kept),
                self._select_query_maps(teachers[guide - 1], kept),
            )
            each = ATTENTION_DISTANCES[measure.loss](*maps).mean(-1)
            total = total + each @ every[kept].to(each.dtype)
        return total / len(self.pairs)

    def _select_query_maps(self, maps: Tensor, query_mask: Tensor) -> Tensor:
        """(B, h, Q, T) where (B, Q) is kept -> (N, h, T), or (N, 1, T) where heads have no counterpart."""
        found = widen_dtype(maps.transpose(1, 2)[query_mask])
        return found if self.per_head else found.mean(1, keepdim=True)
