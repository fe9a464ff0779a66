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

from gkd_lab.config.layer_maps import Pair
from gkd_lab.losses.auxiliary_losses import Seen, StepModule
from gkd_lab.losses.layer_stacks import Distance, OfLayers, matched, recorded, size, weights_at, widened
from gkd_lab.models.rng import key


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """||s - t||^2 / H of each token, (N, H), (N, H) -> (N,): TinyBERT's."""
    return (student - teacher).square().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(s, t) of each token, (N, H), (N, H) -> (N,): half of PKD's || s / ||s|| - t / ||t|| ||^2."""
    return 1 - functional.cosine_similarity(student, teacher, dim=-1)


LOSSES: Mapping[str, Distance] = {
    "mse": mean_squared_error,
    "cosine": cosine_distance,
}


@dataclass(frozen=True)
class HiddenStates(OfLayers):
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
    asks: ClassVar[tuple[str, ...]] = ("hidden_states",)
    losses: ClassVar[Mapping[str, Distance]] = LOSSES

    def module(self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int) -> StepModule:
        """Raises ValueError for a layer or a stack that one of the models does not have."""
        assert teacher is not None, "hidden states are matched with a teacher's"
        pairs = matched(self.layers, student, teacher, self.stack, first=0)
        own, guide = (size(config, self.stack, "width") for config in (student, teacher))
        return HiddenMatching(self, pairs, projections(len(pairs), own, guide, seed))


def projections(pairs: int, student: int, teacher: int, seed: int) -> list[nn.Parameter]:
    """A map of student width to teacher width for each pair, (teacher, student); none of equal widths.

    Drawn as torch draws a linear layer's weights, uniform within 1 / sqrt(student).
    """
    if student == teacher:
        return []
    generator = torch.Generator().manual_seed(key(seed, 0, "projections"))
    bound = 1 / math.sqrt(student)
    drawn = (torch.rand(teacher, student, generator=generator, dtype=torch.float64) for _ in range(pairs))
    return [nn.Parameter(((2 * one - 1) * bound).float()) for one in drawn]


class HiddenMatching(StepModule):
    """A cell's hidden-layer matching, and its projections."""

    def __init__(
        self, measure: HiddenStates, pairs: Sequence[Pair], projections: Sequence[nn.Parameter]
    ) -> None:
        super().__init__()
        self.measure, self.pairs = measure, tuple(pairs)
        self.projections = nn.ParameterList(projections)

    def forward(self, seen: Seen) -> Tensor:
        """Distance of the matched layers, (): per token, weighted, the mean over pairs."""
        assert seen.teacher is not None, "hidden states are matched with a teacher's"
        measure = self.measure
        students, teachers = (
            recorded(one, measure.kind, measure.stack) for one in (seen.student, seen.teacher)
        )
        every = weights_at(seen, measure.stack, students[0].shape[1], predictions=True)
        kept = every > 0
        total = every.new_zeros(())
        for n, (own, guide) in enumerate(self.pairs):
            student = self._projected(n, widened(students[own][kept]))
            teacher = widened(teachers[guide][kept]).to(student.dtype)
            total = total + LOSSES[measure.loss](student, teacher) @ every[kept].to(student.dtype)
        return total / len(self.pairs)

    def _projected(self, pair: int, states: Tensor) -> Tensor:
        """(N, student's H) -> (N, teacher's H)."""
        if not self.projections:
            return states
        weight = self.projections[pair]
        wide = torch.promote_types(states.dtype, weight.dtype)
        return functional.linear(states.to(wide), weight.to(wide))
