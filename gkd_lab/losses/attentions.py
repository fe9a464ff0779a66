"""Attention matching: distance between the attention maps of student and teacher, layer by layer.

TinyBERT's attention-based distillation (Jiao et al. 2020) and the attention transfer of MiniLM (Wang et al.
2020). Shapes: B rows, h heads, Q queries, T keys, N queries that count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gkd_lab.config.layer_maps import LayerPair
from gkd_lab.config.loss_terms import AttentionsConfig
from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss, AuxiliaryModule, LossInputs
from gkd_lab.losses.layer_stacks import (
    Distance,
    match_layers,
    position_weights,
    stack_outputs,
    stack_size,
    widen_dtype,
)
from gkd_lab.models.forward import is_decoder_only

EAGER_ATTENTION = "eager"
"""transformers' only implementation of attention that returns its maps."""

LOG_GRADIENT_MARGIN = 2.0**16
"""How far above the smallest normal number a probability has to be for its logarithm to have a gradient."""


def attention_score_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return each query's mean squared error of attention scores before the softmax, (N, h): TinyBERT's.

    student, teacher: attention maps, (N, h, T). The scores are recovered from the maps, as their logarithms
    less the mean over the keys: up to a number added to all scores of a query, which changes no map. Keys to
    which either map gives exactly 0 (masked, outside of a window, dropped) are left out.
    """
    read = (student > 0) & (teacher > 0)
    count = read.sum(-1).clamp_min(1)
    differences = _log_with_bounded_gradient(student, read) - _log_with_bounded_gradient(teacher, read)
    centred = differences - (differences.sum(-1) / count)[..., None]
    return torch.where(read, centred, 0).square().sum(-1) / count


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of each query's attention map, (N, h, T) twice -> (N, h): MiniLM's.

    Keys to which either map gives exactly 0 are left out.
    """
    read = (student > 0) & (teacher > 0)
    ratio = _log_with_bounded_gradient(teacher, read) - _log_with_bounded_gradient(student, read)
    return (teacher * ratio).sum(-1)


def _log_with_bounded_gradient(maps: Tensor, mask: Tensor) -> Tensor:
    """Return log(maps) where the mask is true, else 0; very small probabilities get no gradient.

    A probability so small that the logarithm's gradient, 1 / p, times the incoming gradient would leave the
    dtype's range (1e-33 in float32) gets no gradient either: infinity here is NaN behind the softmax.
    """
    finite = maps > torch.finfo(maps.dtype).tiny * LOG_GRADIENT_MARGIN
    return torch.where(mask, torch.where(finite, maps, maps.detach()), 1).log()


ATTENTION_DISTANCES: Mapping[str, Distance] = {"mse": attention_score_mse, "kl": attention_kl}


@dataclass(frozen=True)
class AttentionLoss(AuxiliaryLoss):
    """Mean over pairs of layers and over heads of the distance between self-attention maps.

    Every real token of a row that is trained on counts as a query, prompt included, as in the sources: maps
    of the prompt are what the completion is read from. They share their row's weight in the loss. Numbers of
    heads that differ: the mean of the maps over the heads of each model is compared. There is no layer 0.
    """

    config: AttentionsConfig

    config_class = AttentionsConfig
    log_name = "attentions"
    required_outputs = ("attentions",)

    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> AuxiliaryModule:
        """Return the module of one cell, which has no parameters, with the layer pairs of these models.

        Raises ValueError for a layer or a stack that is missing, and for a model that returns no maps.
        """
        assert teacher is not None, "attention maps are matched with a teacher's"
        config = self.config
        pairs = match_layers(config.layers, student, teacher, config.stack, first=config.first)
        for role, model in {"student": student, "teacher": teacher}.items():
            if model._attn_implementation != EAGER_ATTENTION:
                raise ValueError(
                    f"attentions: the {role}'s attn_implementation is {model._attn_implementation!r}, which "
                    f"gives no maps: load it with attn_implementation={EAGER_ATTENTION!r}"
                )
        heads = [stack_size(model, config.stack, "heads") for model in (student, teacher)]
        return AttentionModule(config, pairs, per_head=heads[0] == heads[1])


def enable_attention_maps(model: PreTrainedModel) -> None:
    """Make an unwrapped model return attention maps, by eager attention; ValueError for a float64 decoder.

    Raises:
        ValueError: if it cannot, and for a decoder in float64.
    """
    if model.dtype == torch.float64 and is_decoder_only(model):
        # transformers' eager softmax is in float32, where float64's mask is -inf: NaN where all is masked.
        raise ValueError(
            "attentions: transformers' eager attention gives NaN beside padding in float64: use fp32"
        )
    model.set_attn_implementation(EAGER_ATTENTION)


class AttentionModule(AuxiliaryModule):
    """Computes the attention loss of one cell; it has no parameters."""

    def __init__(self, config: AttentionsConfig, pairs: Sequence[LayerPair], *, per_head: bool) -> None:
        super().__init__()
        self.config, self.pairs, self.per_head = config, tuple(pairs), per_head

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the maps' distance, (): weighted over queries, averaged over heads and layer pairs."""
        assert inputs.teacher is not None, "attention maps are matched with a teacher's"
        stack, distance = self.config.stack, ATTENTION_DISTANCES[self.config.loss]
        student_maps, teacher_maps = (
            stack_outputs(outputs, "attentions", stack) for outputs in (inputs.student, inputs.teacher)
        )
        weights = position_weights(inputs, stack, student_maps[0].shape[2], predictions=False)
        mask = weights > 0
        total = weights.new_zeros(())
        for student_layer, teacher_layer in self.pairs:
            student = self._select_query_maps(student_maps[student_layer - 1], mask)
            teacher = self._select_query_maps(teacher_maps[teacher_layer - 1], mask)
            per_query = distance(student, teacher).mean(-1)
            total = total + per_query @ weights[mask].to(per_query.dtype)
        return total / len(self.pairs)

    def _select_query_maps(self, maps: Tensor, query_mask: Tensor) -> Tensor:
        """Return the maps of the mask's queries, (N, h, T), or their mean over heads, (N, 1, T).

        maps: (B, h, Q, T); query_mask: (B, Q). The mean where the models' numbers of heads differ.
        """
        selected = widen_dtype(maps.transpose(1, 2)[query_mask])
        return selected if self.per_head else selected.mean(1, keepdim=True)
