"""Arguments and results of the loss of all cells, and the checks that they fit together.

Shapes: K cells, M blocks of teacher rows, N tokens of a cell, V vocabulary, H width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits, TeacherLogits
from gkd_lab.losses.terms import FIRST_TEACHER_TARGET, WeightedLoss, WeightedLosses, required_teachers
from gkd_lab.models.projection import Projection

_ZERO_TERM = WeightedLoss(CrossEntropy(), 0.0)
"""Stands for the logits' terms of a loss that has none, for the entropy alone."""


@dataclass(frozen=True)
class CellLosses:
    """Results of `compute_cell_losses`.

    losses: (K,), differentiable by the student's hidden states and by the weight and bias of its head.
    entropies: (K,), the student's entropy in nats, summed over the tokens with a weight above 0; no gradient.
    terms: (K, largest number of terms), each term's part of the loss; no gradient. 0 for terms that are not
        computed from logits.
    """

    losses: Tensor
    entropies: Tensor
    terms: Tensor

    def add_terms(self, values: Mapping[tuple[int, int], Tensor]) -> "CellLosses":
        """Return a copy with each value, (), added to its cell's loss and, detached, set in `terms`.

        values: (cell, number of the term) -> value.
        """
        losses, terms = list(self.losses.unbind()), self.terms.clone()
        for (cell, number), value in values.items():
            losses[cell] = losses[cell] + value.to(losses[cell].dtype)
            terms[cell, number] = value.detach().to(terms.dtype)
        return replace(self, losses=torch.stack(losses), terms=terms)


@dataclass(frozen=True)
class LossArguments:
    """The arguments of `compute_cell_losses` that take no gradient."""

    teachers: Mapping[int, TeacherLogits]
    block_of_cell: tuple[int, ...]
    terms: tuple[WeightedLosses, ...]
    weights: Tensor
    labels: Tensor | None
    routes: Tensor | None
    scales: Mapping[tuple[int, int], Tensor]
    vocabulary: int | None
    lengths: tuple[int, ...] | None = None

    def is_single_divergence(self, cell: int) -> bool:
        """Whether the cell's only term is a divergence from the first teacher, and no term has scales."""
        terms = self.terms[cell]
        return (
            len(terms) == 1
            and isinstance(terms[0].loss, Divergence)
            and terms[0].target == FIRST_TEACHER_TARGET
            and not self.scales
        )

    def logit_terms(self, cell: int) -> list[tuple[int, WeightedLoss]]:
        """Return (number, term) of token losses: the first and others of nonzero weight, or one zero term.

        At least one, as the student's entropy is computed with the first.
        """
        terms = [(number, term) for number, term in enumerate(self.terms[cell]) if term.is_token_loss]
        # The first one is computed even if it has no weight.
        return [terms[0], *(pair for pair in terms[1:] if pair[1].weight)] if terms else [(0, _ZERO_TERM)]


def shared_vocabulary(student: Tensor, head: Projection, arguments: LossArguments) -> int:
    """Return the smallest vocabulary size of student and teachers, or the stated one, which may be smaller.

    Raises ValueError for a stated one that is larger. student: its hidden states.
    """
    shared = head.get_vocabulary_size(student)
    for teacher in arguments.teachers.values():
        shared = min(shared, teacher.vocabulary)
    if arguments.vocabulary is not None and not 0 < arguments.vocabulary <= shared:
        raise ValueError(f"vocabulary {arguments.vocabulary} is not in 1 to {shared}, what both heads have")
    return shared if arguments.vocabulary is None else arguments.vocabulary


def check_shapes(student: Tensor, head: Projection, arguments: LossArguments) -> None:
    """Raise ValueError if shapes do not fit, a teacher or labels are missing, or a head is sharded."""
    cells, tokens = student.shape[:2]
    shapes = [teacher.shape for teacher in arguments.teachers.values()]
    blocks = shapes[0][0] if shapes else cells
    for shape in shapes:
        if shape != (blocks, tokens):
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {shape} must be (K, N, H_s) and (M, N)"
            )
    if arguments.weights.shape != (cells, tokens):
        raise ValueError(
            f"student {tuple(student.shape)} and weights {tuple(arguments.weights.shape)} must be "
            "(K, N, H_s) and (K, N)"
        )
    if len(arguments.block_of_cell) != cells or len(arguments.terms) != cells:
        raise ValueError(
            f"{len(arguments.block_of_cell)} blocks and {len(arguments.terms)} lists of terms for {cells} "
            "cells: give one of each a cell"
        )
    token_terms = [tuple(t for t in terms if t.is_token_loss) for terms in arguments.terms]
    missing = sorted(set(required_teachers(token_terms)) - set(arguments.teachers))
    if missing:
        detail = "" if missing == [0] else f" (number {missing[0]} is missing)"
        raise ValueError(f"a divergence compares with a teacher: give its hidden states and head{detail}")
    if arguments.labels is None and any(term.reads_labels for terms in token_terms for term in terms):
        raise ValueError("cross-entropy reads the tokens themselves: give them as labels, (K, N)")
    if not set(arguments.block_of_cell) <= set(range(blocks)):
        raise ValueError(
            f"block_of_cell {arguments.block_of_cell} must lie in range({blocks}), the teacher's blocks"
        )
    if cells > 1 and head.weight is not None and head.weight.dim() != 3:
        raise ValueError(f"{cells} packed students need a head (K, V, H), got {tuple(head.weight.shape)}")
    if cells > 1 and head.bias is not None and head.bias.requires_grad and head.bias.shape[0] != cells:
        raise ValueError(f"{cells} packed students need a bias (K, V), got {tuple(head.bias.shape)}")
    teachers = arguments.teachers.values()
    heads = [teacher.head for teacher in teachers if isinstance(teacher, HiddenTeacherLogits)]
    for name, weight in (("student", head.weight), *(("teacher", teacher.weight) for teacher in heads)):
        if isinstance(weight, DTensor):
            raise ValueError(f"the {name}'s head is sharded as {weight.placements}: pass the full tensor")
