"""Squared distances of a student's outputs: of a regression's numbers, or of logits.

Shapes: N positions (rows, or tokens), V outputs, 1 of a regression.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_lab.config.loss_terms import SquaredErrorConfig
from gkd_lab.losses.loss import LabelLoss, Loss, TeacherLoss


@dataclass(frozen=True)
class SquaredError(TeacherLoss):
    """Mean over outputs of (student - teacher)^2: the soft targets of a regression; of logits, their matching
    (Ba and Caruana 2014, Eq. 1, without the 1/2).
    """

    config_class = SquaredErrorConfig
    log_name = "squared_error"
    takes_cell_axis = True

    @classmethod
    def build(cls, config: SquaredErrorConfig) -> Loss:
        """Return `SquaredError` or, if the config is against labels, `LabelSquaredError`."""
        return cls() if config.against == "teacher" else LabelSquaredError()

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Return the value of each position, (N,), by autograd: the reference."""
        return (student_logits_NV - teacher_logits_NV).square().mean(-1)

    @torch.no_grad()
    def value_and_gradient(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean squared differences, (N,), gradient, (N, V), and the entropy of softmax(student), (N,).

        Without autograd; the entropy of a single output is 0.
        """
        gap = student_logits_NV - teacher_logits_NV
        logs = student_logits_NV.log_softmax(-1)
        return gap.square().mean(-1), gap * (2 / gap.shape[-1]), -(logs.exp() * logs).sum(-1)


@dataclass(frozen=True)
class LabelSquaredError(LabelLoss):
    """(student - label)^2: the hard labels of a regression."""

    config_class = SquaredErrorConfig
    log_name = "squared_error_labels"
    takes_cell_axis = True

    def value_and_gradient(
        self, student_logits_NV: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `SquaredError`'s three results against labels; ValueError if there are several outputs."""
        if student_logits_NV.shape[-1] != 1:
            raise ValueError(
                "squared_error against labels compares numbers, and the model has "
                f"{student_logits_NV.shape[-1]} outputs: choose cross_entropy"
            )
        labels = labels_N[..., None].to(student_logits_NV.dtype)
        return SquaredError().value_and_gradient(student_logits_NV, labels)
