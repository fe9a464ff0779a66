"""Squared distances of a student's outputs: of a regression's numbers, or of logits themselves.

Shapes: N positions (rows, or tokens), V outputs, 1 of a regression.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Against = Literal["teacher", "labels"]
AGAINST: tuple[Against, ...] = ("teacher", "labels")


@dataclass(frozen=True)
class SquaredError:
    """Mean over outputs of (student - teacher)^2: soft targets of a regression; of logits it is their
    matching (Ba and Caruana 2014, Eq. 1, without the 1/2).
    """

    kind: ClassVar[str] = "squared_error"

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        """Value of each position, (N,), by autograd: the reference."""
        return (student_NV - teacher_NV).square().mean(-1)

    @torch.no_grad()
    def value_and_gradient(self, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, (N,), their gradient by the student's outputs, (N, V), and the entropy of these as logits,
        (N,), in nats: 0 of a number."""
        gap = student_NV - teacher_NV
        logs = student_NV.log_softmax(-1)
        return gap.square().mean(-1), gap * (2 / gap.shape[-1]), -(logs.exp() * logs).sum(-1)


def label_squared_error(student_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the data's own numbers: hard labels of a regression. ValueError: V is not 1."""
    if student_NV.shape[-1] != 1:
        raise ValueError(
            f"squared_error against labels compares numbers, and the model has {student_NV.shape[-1]} "
            "outputs: choose cross_entropy"
        )
    return SquaredError().value_and_gradient(student_NV, labels_N[:, None].to(student_NV.dtype))
