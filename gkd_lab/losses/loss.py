"""Interfaces of the losses that a term of the training loss can have.

A `TeacherLoss` compares the student's logits with a teacher's, a `LabelLoss` with the tokens themselves; an
`AuxiliaryLoss` (`gkd_lab.losses.auxiliary_losses`) reads hidden states, attention maps or texts.

Shapes: N tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from gkd_lab.config.loss_terms import WeightedTerm


class Loss(ABC):
    """A loss without its weight: immutable, and equal to every other one that computes the same."""

    config_class: ClassVar[type[WeightedTerm]]
    """Describes and validates the term in YAML and in `GKDConfig`."""
    log_name: ClassVar[str]
    """Name of the term in the training log."""

    @classmethod
    def build(cls, config: Any) -> "Loss":
        """Return the loss that an instance of `config_class` describes; its weight is not part of it."""
        return cls(config)  # type: ignore[call-arg]


class TokenLoss(Loss):
    """A loss of single tokens, computed from the student's logits."""

    takes_cell_axis: ClassVar[bool] = False
    """Whether `value_and_gradient` takes (k, N, V) too, with teacher's logits (1, N, V) or (k, N, V)."""


class TeacherLoss(TokenLoss):
    """A token loss that compares with the logits of a teacher."""

    @abstractmethod
    def value_and_gradient(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, (N,), gradient by student logits, (N, V), and entropies, (N,); no autograd.

        The entropies are the student's, in nats.
        """


class LabelLoss(TokenLoss):
    """A token loss that compares with the tokens themselves; it needs no teacher."""

    on_policy: ClassVar[bool] = False
    """Whether it learns from text that the student sampled; otherwise from the text of others alone."""

    @abstractmethod
    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, (N,), gradient by student logits, (N, V), and entropies, (N,); no autograd.

        The entropies are the student's, in nats.
        """
