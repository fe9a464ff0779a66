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
from gkd_lab.models.projection import Arithmetic, Projection

Read = Callable[[int, Tensor], Tensor]
"""(block, rows (n,)) -> logits (n, V), in a buffer that the next call overwrites."""


class Guide(Protocol):
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

    def chosen(self, positions: Tensor) -> "Guide":
        """The same at positions (M, N') alone."""
        ...

    def reader(self, vocabulary: int, wide: torch.dtype, longest: int) -> Read:
        """Logits of the first `vocabulary` tokens, in `wide`, of at most `longest` rows at once."""
        ...


@dataclass(frozen=True)
class Projected:
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
        return self.head.rows(self.hidden)

    def chosen(self, positions: Tensor) -> "Projected":
        return Projected(gathered(self.hidden, positions), self.head)

    def reader(self, vocabulary: int, wide: torch.dtype, longest: int) -> Read:
        head = self.head.packed().first(vocabulary)
        arithmetic = Arithmetic.of(self.hidden, wide)
        buffer = self.hidden.new_empty(longest * vocabulary, dtype=wide)

        def read(block: int, rows: Tensor) -> Tensor:
            hidden = self.hidden[block, rows][None]
            return head.logits(project(hidden, head, vocabulary, arithmetic, buffer))[0]

        return read


@dataclass(frozen=True)
class Target:
    """Which of the teachers a divergence compares with, and how several become one distribution.

    teachers: their numbers. One: its own logits. Several: sum_i w_i softmax(z_i / T_i), or with `routed` for
        each row the teacher that its own data names.
    weights: w_i, which sum to 1. temperatures: T_i; empty: 1 each.
    """

    teachers: tuple[int, ...] = (0,)
    weights: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = ()
    routed: bool = False

    def __post_init__(self) -> None:
        if not self.teachers or min(self.teachers) < 0 or len(set(self.teachers)) < len(self.teachers):
            raise ValueError(f"teachers {self.teachers} must be distinct numbers from 0")
        for name in ("weights", "temperatures"):
            values = getattr(self, name)
            if values and len(values) != len(self.teachers):
                raise ValueError(f"{len(values)} {name} for {len(self.teachers)} teachers: give one of each")
            if any(not 0 < value < math.inf for value in values):
                raise ValueError(f"{name} {values} of teachers must be positive numbers")
        if self.weights and abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights {self.weights} of a mixture of teachers must sum to 1")

    def logits(self, of_teacher: Callable[[int], Tensor], routes: Tensor | None) -> Tensor:
        """Logits (n, V) of what is compared with, from each teacher's.

        routes: (n,), for each token the teacher that its row is meant for.
        """
        if self.routed:
            return self._routed(of_teacher, routes)
        if len(self.teachers) == 1 and not self.temperatures:
            return of_teacher(self.teachers[0])
        temperatures = self.temperatures or (1.0,) * len(self.teachers)
        weights = self.weights or (1 / len(self.teachers),) * len(self.teachers)
        mixed: Tensor | None = None
        for teacher, weight, temperature in zip(self.teachers, weights, temperatures, strict=True):
            part = log_probabilities(of_teacher(teacher), temperature).add_(math.log(weight))
            mixed = part if mixed is None else torch.logaddexp(mixed, part)
        assert mixed is not None, "a target has a teacher"
        return mixed

    def _routed(self, of_teacher: Callable[[int], Tensor], routes: Tensor | None) -> Tensor:
        if routes is None:
            raise ValueError("a routed divergence needs to know each row's teacher: give `routes`")
        temperatures = dict(zip(self.teachers, self.temperatures, strict=False))
        found: Tensor | None = None
        for teacher in self.teachers:
            part = of_teacher(teacher) / temperatures.get(teacher, 1.0)
            found = part if found is None else torch.where((routes == teacher)[:, None], part, found)
        assert found is not None, "a target has a teacher"
        return found


def gathered(hidden: Tensor, chosen: Tensor) -> Tensor:
    """(M, T, H) at positions (M, N) -> (M, N, H)."""
    return hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))


def project(
    hidden: Tensor, head: Projection, vocabulary: int, arithmetic: Arithmetic, buffer: Tensor
) -> Tensor:
    """h W^T + b of (K, n, H) hidden states, (K, n, V), in the beginning of the buffer."""
    raw = buffer[: hidden.shape[0] * hidden.shape[1] * vocabulary].view(*hidden.shape[:2], vocabulary)
    if head.weight is None:
        raw.copy_(hidden[..., :vocabulary])
    else:
        for span in arithmetic.spans(head.weight):
            arithmetic.multiply(hidden, head.weight[:, span].mT, raw[..., span])
    return raw if head.bias is None else raw.add_(head.bias[:, None])
