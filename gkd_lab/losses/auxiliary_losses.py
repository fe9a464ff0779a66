"""Interface of losses that read more than logits: hidden states, attention maps, a discriminator's features.

An `AuxiliaryLoss` is a description; for each cell it creates an `AuxiliaryModule` that computes it, so that a
cell trains in a pack as it does alone. A module's parameters have their own optimizer and a place in the
cell's checkpoints, and are not part of the exported student.

Shapes: B rows of a cell, C completion tokens, T positions of a stack, H width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from gkd_lab.losses.loss import Loss
from gkd_lab.models.forward import Sequences
from gkd_lab.models.projection import Projection


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a model's forward pass over a cell's rows.

    last_hidden: what the output head reads for each completion token, (B, C, H).
    outputs: name -> tensors, under transformers' names: `hidden_states` ((B, T, H): the embeddings, then
        each layer's) and `attentions` ((B, heads, T, T): each layer's); of an encoder-decoder
        `decoder_hidden_states`, `encoder_hidden_states`, `decoder_attentions`, `cross_attentions`, ...
        It holds only the `required_outputs` of the run's losses.
    config: of the model.
    projection: the output head; of a pack the cell's own part.
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
    step: number of finished optimizer steps; together with `seed` it keys all random numbers.
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
        """Sum of the micro-batch's token weights, (): its share of the step (they add up to 1)."""
        return self.weights.sum()


class AuxiliaryModule(nn.Module, ABC):
    """Computes an auxiliary loss for one cell; its parameters, if any, learn from it."""

    learning_rate: float | None = None
    """Of its parameters, before the schedule; None: the cell's."""

    @abstractmethod
    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the micro-batch's part of the loss, (), float32 or float64, differentiable by the student.

        It is weighted by `inputs.weights`, so parts add up over a step, but not by the term's weight. The
        module's parameters take a gradient from it too, times the term's weight.
        """

    def parameter_loss(self, inputs: LossInputs) -> Tensor | None:
        """Return a loss, (), that trains the module's parameters alone, or None: they learn from `forward`.

        It must not reach the student. With a separate loss, `forward` gives the parameters no gradient.
        """
        return None

    def collect_logs(
        self, average_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        """Return log name -> value since the last call, such as an accuracy; by default none.

        average_over_ranks: Mean of a tensor over processes; all processes have to call it equally often.
        """
        return {}


@dataclass(frozen=True)
class AuxiliaryLoss(Loss):
    """A loss that a module computes from the outputs of whole forward passes."""

    reads_teacher: ClassVar[bool] = True
    """Whether it reads the outputs of the first teacher."""
    reads_texts: ClassVar[bool] = False
    """Whether its teacher reads texts in its own tokens (`gkd_lab.losses.uld.TextReader`)."""
    required_outputs: ClassVar[tuple[str, ...]] = ()
    """Outputs that the forward passes record for it: of "hidden_states" and "attentions"."""

    @abstractmethod
    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> AuxiliaryModule:
        """Return a new module for one cell, its parameters drawn from `seed` alone (`torch.Generator`).

        Raises ValueError if student and teacher lack what the loss reads, such as a layer.
        """
