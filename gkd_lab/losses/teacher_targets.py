"""What a teacher says of the tokens that are trained on, and the targets that divergences make of it.

Shapes: M blocks of N tokens, n of them in a chunk, V vocabulary, H width, G teachers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gkd_lab.losses.divergence import log_probabilities
from gkd_lab.models.projection import MatmulPrecision, Projection

LogitReader = Callable[[int, Tensor], Tensor]
"""(block, rows (n,)) -> logits (n, V), in a buffer that the next call overwrites."""


class TeacherLogits(Protocol):
    """A teacher's distributions for M blocks of N tokens, as logits that are made where they are needed."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of what it holds; logits are float32 at least."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows of."""
        ...

    def select_positions(self, positions: Tensor) -> "TeacherLogits":
        """The same at positions (M, N') alone."""
        ...

    def create_reader(self, vocabulary: int, dtype: torch.dtype, max_rows: int) -> LogitReader:
        """Logits of the first `vocabulary` tokens, in `wide`, of at most `longest` rows at once."""
        ...


@dataclass(frozen=True)
class HiddenTeacherLogits:
    """Hidden states (M, N, H), without gradient, and the head that turns them into logits."""

    hidden: Tensor
    head: Projection

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.shape[0], self.hidden.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def vocabulary(self) -> int:
        return self.head.get_vocabulary_size(self.hidden)

    def select_positions(self, positions: Tensor) -> "HiddenTeacherLogits":
        return HiddenTeacherLogits(gather_positions(self.hidden, positions), self.head)

    def create_reader(self, vocabulary: int, dtype: torch.dtype, max_rows: int) -> LogitReader:
        head = self.head.add_cell_axis().truncate_vocabulary(vocabulary)
        arithmetic = MatmulPrecision.create(self.hidden, dtype)
        buffer = self.hidden.new_empty(max_rows * vocabulary, dtype=dtype)

        def read(block: int, rows: Tensor) -> Tensor:
            hidden = self.hidden[block, rows][None]
            return head.scale_and_cap(project_hidden(hidden, head, vocabulary, arithmetic, buffer))[0]

        return read


@dataclass(frozen=True)
class TeacherTarget:
    """Which of the teachers a divergence compares with, and how several become one distribution.

    teachers: their numbers. One: its own logits. Several: sum_i w_i softmax(z_i / T_i), or with `routed` for
        each row the teacher that its own data names.
    weights: w_i, which sum to 1. temperatures: T_i; empty: 1 each.
    """

    teachers: tuple[int, ...] = (0,)
    weights: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = ()
    routed: bool = False

    def combine_logits(self, teacher_logits: Callable[[int], Tensor], routes: Tensor | None) -> Tensor:
        """Logits (n, V) of what is compared with, from each teacher's.

        routes: (n,), for each token the teacher that its row is meant for.
        """
        if self.routed:
            return self._route_logits(teacher_logits, routes)
        if len(self.teachers) == 1 and not self.temperatures:
            return teacher_logits(self.teachers[0])
        temperatures = self.temperatures or (1.0,) * len(self.teachers)
        weights = self.weights or (1 / len(self.teachers),) * len(self.teachers)
        mixed: Tensor | None = None
        for teacher, weight, temperature in zip(self.teachers, weights, temperatures, strict=True):
            part = log_probabilities(teacher_logits(teacher), temperature).add_(math.log(weight))
            mixed = part if mixed is None else torch.logaddexp(mixed, part)
        assert mixed is not None, "a target has a teacher"
        return mixed

    def _route_logits(self, teacher_logits: Callable[[int], Tensor], routes: Tensor | None) -> Tensor:
        if routes is None:
            raise ValueError("a routed divergence needs to know each row's teacher: give `routes`")
        temperatures = dict(zip(self.teachers, self.temperatures, strict=False))
        found: Tensor | None = None
        for teacher in self.teachers:
            part = teacher_logits(teacher) / temperatures.get(teacher, 1.0)
            found = part if found is None else torch.where((routes == teacher)[:, None], part, found)
        assert found is not None, "a target has a teacher"
        return found


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """(M, T, H) at positions (M, N) -> (M, N, H)."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def project_hidden(
    hidden: Tensor, head: Projection, vocabulary: int, arithmetic: MatmulPrecision, buffer: Tensor
) -> Tensor:
    """h W^T + b of (K, n, H) hidden states, (K, n, V), in the beginning of the buffer."""
    raw = buffer[: hidden.shape[0] * hidden.shape[1] * vocabulary].view(*hidden.shape[:2], vocabulary)
    if head.weight is None:
        raw.copy_(hidden[..., :vocabulary])
    else:
        for span in arithmetic.split_rows(head.weight):
            arithmetic.multiply(hidden, head.weight[:, span].mT, raw[..., span])
    return raw if head.bias is None else raw.add_(head.bias[:, None])
