"""Small problems for the fused loss, with the losses of the plain formulas."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd_lab.losses.cell_losses import CellLosses
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.fused_loss import compute_cell_losses
from gkd_lab.models.projection import Projection

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 13, 6, 5, 17
EVERY = (
    Divergence(beta=0.0, teacher_temperature=0.5),
    Divergence(beta=0.5, student_temperature=1.5, rescale=True),
    Divergence("tv", student_temperature=0.8),
    Divergence(beta=1.0),
    Divergence(beta=0.1),
)
HEADS = (
    {},
    {"bias": True},
    {"scale": 0.7},
    {"softcap": 2.0},
    {"bias": True, "scale": 0.3, "softcap": 1.5},
)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass
class Problem:
    """Arguments of `divergence_sums` by name."""

    student: Tensor
    student_head: Projection
    teacher: Tensor
    teacher_head: Projection
    block_of_cell: Sequence[int]
    terms: Sequence[Divergence]
    weights: Tensor
    vocabulary: int | None = None

    def sums(self) -> CellLosses:
        return compute_cell_losses(**vars(self))

    def parameters(self) -> list[Tensor]:
        tensors = (self.student, self.student_head.weight, self.student_head.bias)
        return [tensor for tensor in tensors if tensor is not None]

    def dense(self) -> Tensor:
        """The losses by the reference, (K,), with all logits at once."""
        rows = min(
            self.student_head.get_vocabulary_size(self.student),
            self.teacher_head.get_vocabulary_size(self.teacher),
        )
        rows = self.vocabulary or rows
        student = self.student_head(self.student)[..., :rows]
        teacher = self.teacher_head(self.teacher)[..., :rows]
        return torch.stack(
            [
                (divergence(student[cell], teacher[block]) * self.weights[cell]).sum()
                for cell, (block, divergence) in enumerate(zip(self.block_of_cell, self.terms, strict=True))
            ]
        )


def problem(
    terms: Sequence[Divergence] = EVERY[:1],
    blocks: Sequence[int] = (0,),
    *,
    rows: tuple[int, int] = (VOCABULARY, VOCABULARY),
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    **head: Any,
) -> Problem:
    cells, teachers = len(terms), max(blocks) + 1
    packed = (cells,) if cells > 1 else ()
    student_bias = normal(5, *packed, rows[0], dtype=dtype).requires_grad_() if bias else None
    weights = normal(6, cells, TOKENS).abs().float().to(torch.float64)
    weights[:, 2] = weights[0, 4] = weights[:, 7] = 0
    return Problem(
        normal(1, cells, TOKENS, WIDTH, dtype=dtype).requires_grad_(),
        Projection(normal(2, *packed, rows[0], WIDTH, dtype=dtype).requires_grad_(), student_bias, **head),
        normal(3, teachers, TOKENS, TEACHER_WIDTH, dtype=dtype),
        Projection(
            normal(4, rows[1], TEACHER_WIDTH, dtype=dtype),
            normal(7, rows[1], dtype=dtype) if bias else None,
            **head,
        ),
        blocks,
        terms,
        weights,
    )


def derivatives(losses: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a sum in which each cell has a factor of its own."""
    factors = torch.linspace(0.5, 2, len(losses), dtype=losses.dtype)
    return torch.autograd.grad((losses * factors).sum(), parameters)
