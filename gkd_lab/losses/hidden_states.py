"""Hidden-state matching: distance between the hidden states of student and teacher, layer by layer.

The loss of Patient KD (Sun et al. 2019) and of TinyBERT (Jiao et al. 2020). MiniLM (Wang et al. 2020)
compares relations between tokens instead, which needs no projection. Shapes: N tokens, H width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from gkd_lab.config.layer_maps import LayerPair
from gkd_lab.config.loss_terms import HiddenStatesConfig
from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss, AuxiliaryModule, LossInputs
from gkd_lab.losses.layer_stacks import (
    Distance,
    match_layers,
    position_weights,
    stack_outputs,
    stack_size,
    widen_dtype,
)
from gkd_lab.models.rng import derive_seed


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ||s - t||^2 / H of each token, (N, H) twice -> (N,): TinyBERT's."""
    return (student - teacher).square().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cos(s, t) of each token, (N, H) twice -> (N,).

    It is half of PKD's || s / ||s|| - t / ||t|| ||^2.
    """
    return 1 - functional.cosine_similarity(student, teacher, dim=-1)


HIDDEN_STATE_DISTANCES: Mapping[str, Distance] = {
    "mse": mean_squared_error,
    "cosine": cosine_distance,
}


@dataclass(frozen=True)
class HiddenStateLoss(AuxiliaryLoss):
    """Mean over pairs of layers of the distance between hidden states, weighted as tokens are.

    The states of a decoder count where they predict a token that is trained on, each with that token's weight
    in the loss (ours: TinyBERT takes every token of its sentence, PKD the one that BERT classifies by). Those
    of an encoder or a classifier count at each token of the prompt, which share the weight of its completion
    or label. Where widths differ the student's states pass through a learnt linear map without bias, one for
    each pair (ours: TinyBERT's code has one for all).

    Layer 0 is the embeddings, as TinyBERT matches them; layer n its output, of the last one as the head reads
    it.
    """

    config: HiddenStatesConfig

    config_class = HiddenStatesConfig
    log_name = "hidden_states"
    required_outputs = ("hidden_states",)

    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> AuxiliaryModule:
        """Return the module of one cell, with the models' layer pairs; it projects if their widths differ.

        Raises ValueError for a layer or a stack that one of the models does not have.
        """
        assert teacher is not None, "hidden states are matched with a teacher's"
        config = self.config
        pairs = match_layers(config.layers, student, teacher, config.stack, first=config.first)
        student_width, teacher_width = (
            stack_size(model, config.stack, "width") for model in (student, teacher)
        )
        projections = create_projections(len(pairs), student_width, teacher_width, seed)
        return HiddenStateModule(config, pairs, projections)


def create_projections(count: int, student_width: int, teacher_width: int, seed: int) -> list[nn.Parameter]:
    """Return `count` trainable maps, (teacher width, student width) each; an empty list for equal widths.

    Drawn as torch draws a linear layer's weights, uniform within 1 / sqrt(student).
    """
    if student_width == teacher_width:
        return []
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, "projections"))
    bound, shape = 1 / math.sqrt(student_width), (teacher_width, student_width)
    uniform = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(count))
    return [nn.Parameter(((2 * numbers - 1) * bound).float()) for numbers in uniform]


class HiddenStateModule(AuxiliaryModule):
    """Computes the hidden-state loss of one cell; its projections learn."""

    def __init__(
        self, config: HiddenStatesConfig, pairs: Sequence[LayerPair], projections: Sequence[nn.Parameter]
    ) -> None:
        super().__init__()
        self.config, self.pairs = config, tuple(pairs)
        self.projections = nn.ParameterList(projections)

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the distance of hidden states, (): weighted over tokens, averaged over layer pairs."""
        assert inputs.teacher is not None, "hidden states are matched with a teacher's"
        stack, distance = self.config.stack, HIDDEN_STATE_DISTANCES[self.config.loss]
        student_states, teacher_states = (
            stack_outputs(outputs, "hidden_states", stack) for outputs in (inputs.student, inputs.teacher)
        )
        weights = position_weights(inputs, stack, student_states[0].shape[1], predictions=True)
        mask = weights > 0
        total = weights.new_zeros(())
        for pair, (student_layer, teacher_layer) in enumerate(self.pairs):
            student = self._project_student(pair, widen_dtype(student_states[student_layer][mask]))
            teacher = widen_dtype(teacher_states[teacher_layer][mask]).to(student.dtype)
            total = total + distance(student, teacher) @ weights[mask].to(student.dtype)
        return total / len(self.pairs)

    def _project_student(self, pair: int, states: Tensor) -> Tensor:
        """Map student states, (N, H_s), to the teacher's width, (N, H_t); unchanged for equal widths."""
        if not self.projections:
            return states
        weight = self.projections[pair]
        wide = torch.promote_types(states.dtype, weight.dtype)
        return functional.linear(states.to(wide), weight.to(wide))
