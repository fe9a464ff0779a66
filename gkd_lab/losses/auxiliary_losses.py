"""Terms of a loss that read more of a step than logits: hidden states, attentions, a discriminator's view.

What such a term computes is said by a `AuxiliaryLoss`; a `AuxiliaryModule` of its own computes it for each cell, so
that the cells of a pack stay apart as they do alone. What a module learns is its own: an optimizer, a place
in the cell's checkpoints, and no place in the student that is exported.

Shapes: B rows of a cell, C completion tokens, T positions of a stack, L layers, H width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from gkd_lab.models.forward import Sequences
from gkd_lab.models.projection import Projection


@dataclass(frozen=True)
class ModelOutputs:
    """What a model's forward pass left behind on a cell's rows.

    last: what the output head reads for each completion token, (B, C, H).
    outputs: name -> tensors, under transformers' names: `hidden_states` ((B, T, H): the embeddings, then
        each layer's) and `attentions` ((B, heads, T, T): each layer's); of an encoder-decoder
        `decoder_hidden_states`, `encoder_hidden_states`, `decoder_attentions`, `cross_attentions`, ...
        Only what the measures of the run ask for is there.
    config: of the model.
    projection: its head, as the loss reads it; of a pack the cell's own.
    """

    last_hidden: Tensor
    outputs: Mapping[str, tuple[Tensor, ...]]
    config: PretrainedConfig
    projection: Projection


@dataclass(frozen=True)
class LossInputs:
    """One cell's part of a micro-batch.

    weights: (B, C), of each completion token in the cell's loss: 0 where nothing is trained, and a sum of 1
        over all micro-batches of the step.
    step: optimizer steps done; with `seed` it keys whatever is random.
    """

    rows: Sequences
    student: ModelOutputs
    teacher: ModelOutputs | None
    weights: Tensor
    on_policy: bool
    step: int
    seed: int

    @property
    def weight_sum(self) -> Tensor:
        """This micro-batch's share of the step, (): what a mean over its rows is to be multiplied by."""
        return self.weights.sum()


class AuxiliaryModule(nn.Module, ABC):
    """A term of one cell. Its parameters, if it has any, learn from what `forward` and `own_loss` give."""

    learning_rate: float | None = None
    """Of its parameters, before the schedule; None: the cell's."""

    @abstractmethod
    def forward(self, inputs: LossInputs) -> Tensor:
        """The term's value, (), in float32 or float64, differentiable by the student's pass.

        Its parameters take a gradient from it as well, times the term's weight.
        """

    def parameter_loss(self, inputs: LossInputs) -> Tensor | None:
        """A loss for the module's parameters alone, (), which must not reach the student; None: it has none.

        Where there is one, `forward` gives the parameters nothing.
        """
        return None

    def collect_logs(
        self, average_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        """What the log is to say of the last step besides the term's value, such as an accuracy.

        over_ranks: Mean of a tensor over processes, which all of them call alike.
        """
        return {}


@dataclass(frozen=True)
class AuxiliaryLoss(ABC):
    """What a term computes: a frozen description, equal for terms that are."""

    kind: ClassVar[str]
    """Its `type` in an experiment, and the name that it is logged under."""
    reads_teacher: ClassVar[bool] = True
    required_outputs: ClassVar[tuple[str, ...]] = ()
    """What both passes record: of "hidden_states" and "attentions"."""

    @abstractmethod
    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> AuxiliaryModule:
        """A module for a cell, its parameters drawn from `seed` alone (`torch.Generator`).

        Raises ValueError if student and teacher do not have what the measure names.
        """
