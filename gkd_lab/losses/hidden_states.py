"""Hidden-layer matching: the student's hidden states are drawn to its teacher's, layer by layer.

The measure of Patient KD (Sun et al. 2019) and of TinyBERT (Jiao et al. 2020). MiniLM (Wang et al. 2020)
compares relations between tokens in their place, which needs no projection. Shapes: N tokens, H width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

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
from gkd_lab.models.rng import derive_seed


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """||s - t||^2 / H of each token, (N, H), (N, H) -> (N,): TinyBERT's."""
    return (student - teacher).square().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(s, t) of each token, (N, H), (N, H) -> (N,): half of PKD's || s / ||s|| - t / ||t|| ||^2."""
    return 1 - functional.cosine_similarity(student, teacher, dim=-1)


HIDDEN_STATE_DISTANCES: Mapping[str, Distance] = {
    "mse": mean_squared_error,
    "cosine": cosine_distance,
}


@dataclass(frozen=True)
class HiddenStateLoss(LayerLoss):
    """The mean over pairs of layers of the distance between hidden states, weighted as tokens are.

    The states of a decoder count where they predict a token that is trained on, each with that token's weight
    in the loss (ours: TinyBERT takes every token of its sentence, PKD the one that BERT classifies by). Those
    of an encoder or a classifier count at each token of the prompt, which share the weight of its completion
    or label. Where widths differ the student's states pass through a linear map without bias that is learnt
    along, one for each pair (ours: TinyBERT's code has one for all).

    Layer 0 is the embeddings, as TinyBERT matches them; layer n what comes after it, of the last one as the
    head reads it. loss: "mse" or "cosine", which does not see lengths.
    """

    kind: ClassVar[str] = "hidden_states"
    required_outputs: ClassVar[tuple[str, ...]] = ("hidden_states",)
    distances: ClassVar[Mapping[str, Distance]] = HIDDEN_STATE_DISTANCES

    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> AuxiliaryModule:
        """Raises ValueError for a layer or a stack that one of the models does not have."""
        assert teacher is not None, "hidden states are matched with a teacher's"
        pairs = match_layers(self.layers, student, teacher, self.stack, first=0)
        own, guide = (stack_size(config, self.stack, "width") for config in (student, teacher))
        return HiddenStateModule(self, pairs, create_projections(len(pairs), own, guide, seed))


def create_projections(count: int, student_width: int, teacher_width: int, seed: int) -> list[nn.Parameter]:
    """A map of student width to teacher width for each pair, (teacher, student); none of equal widths.

    Drawn as torch draws a linear layer's weights, uniform within 1 / sqrt(student).
    """
    if student_width == teacher_width:
        return []
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, "projections"))
    bound = 1 / math.sqrt(student_width)
    drawn = (
        torch.rand(teacher_width, student_width, generator=generator, dtype=torch.float64)
        for _ in range(count)
    )
    return [nn.Parameter(((2 * one - 1) * bound).float()) for one in drawn]


class HiddenStateModule(AuxiliaryModule):
    """A cell's hidden-layer matching, and its projections."""

    def __init__(
        self, loss: HiddenStateLoss, pairs: Sequence[LayerPair], projections: Sequence[nn.Parameter]
    ) -> None:
        super().__init__()
        self.loss, self.pairs = loss, tuple(pairs)
        self.projections = nn.ParameterList(projections)

    def forward(self, inputs: LossInputs) -> Tensor:
        """Distance of the matched layers, (): per token, weighted, the mean over pairs."""
        assert inputs.teacher is not None, "hidden states are matched with a teacher's"
        measure = self.loss
        students, teachers = (
            stack_outputs(one, measure.kind, measure.stack) for one in (inputs.student, inputs.teacher)
        )
        every = position_weights(inputs, measure.stack, students[0].shape[1], predictions=True)
        kept = every > 0
        total = every.new_zeros(())
        for n, (own, guide) in enumerate(self.pairs):
            student = self._project_student(n, widen_dtype(students[own][kept]))
            teacher = widen_dtype(teachers[guide][kept]).to(student.dtype)
            total = total + HIDDEN_STATE_DISTANCES[measure.loss](student, teacher) @ every[kept].to(
                student.dtype
            )
        return total / len(self.pairs)

    def _project_student(self, pair: int, states: Tensor) -> Tensor:
        """(N, student's H) -> (N, teacher's H)."""
        if not self.projections:
            return states
        weight = self.projections[pair]
        wide = torch.promote_types(states.dtype, weight.dtype)
        return functional.linear(states.to(wide), weight.to(wide))
