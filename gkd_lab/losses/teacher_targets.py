"""Teacher logits for the trained tokens, and the mixtures of teachers that divergences compare with.

Shapes: M blocks of N tokens, m and n of them in a chunk, V vocabulary, H width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gkd_lab.losses.divergence import log_probabilities
from gkd_lab.models.projection import MatmulPrecision, Projection

LogitReader = Callable[[int | slice | Tensor, slice | Tensor], Tensor]
"""(block, rows) -> logits (n, V), or of several blocks (m, n, V), in a buffer that the next call overwrites.

Rows are a slice or their numbers, (n,); blocks a number, a slice or a tensor, (m,).
"""


class TeacherLogits(Protocol):
    """A teacher's logits for M blocks of N tokens, computed chunk by chunk where they are needed."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks and of tokens in each, (M, N)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensors; logits are float32 at least."""
        ...

    @property
    def vocabulary(self) -> int:
        """Size of the teacher's vocabulary."""
        ...

    def select_positions(self, positions: Tensor) -> "TeacherLogits":
        """Return the logits at these positions of each block alone, (M, N')."""
        ...

    def create_reader(self, vocabulary: int, dtype: torch.dtype, max_rows: int) -> LogitReader:
        """Return a reader of the first `vocabulary` logits, of `max_rows` tokens of all blocks at most."""
        ...


@dataclass(frozen=True)
class HiddenTeacherLogits:
    """Logits as hidden states (M, N, H), without gradient, and the head that projects them."""

    hidden: Tensor
    head: Projection

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks and of tokens in each, (M, N)."""
        return self.hidden.shape[0], self.hidden.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return self.hidden.dtype

    @property
    def vocabulary(self) -> int:
        """Number of logits of the head."""
        return self.head.get_vocabulary_size(self.hidden)

    def select_positions(self, positions: Tensor) -> "HiddenTeacherLogits":
        """Return the hidden states at these positions of each block, (M, N'), with the same head."""
        return HiddenTeacherLogits(gather_positions(self.hidden, positions), self.head)

    def create_reader(self, vocabulary: int, dtype: torch.dtype, max_rows: int) -> LogitReader:
        """Return a reader that projects a block's rows to logits, (n, vocabulary), when it is called.

        Each call overwrites the logits of the one before.
        """
        arithmetic = MatmulPrecision.create(self.hidden, dtype)
        head = arithmetic.convert_head(self.head.add_cell_axis().truncate_vocabulary(vocabulary))
        buffer = self.hidden.new_empty(max_rows * vocabulary, dtype=dtype)

        def read(block: int | slice | Tensor, rows: slice | Tensor) -> Tensor:
            """Project the blocks' rows into the buffer and return their scaled and capped logits."""
            hidden = select_block_rows(self.hidden, block, rows)
            flat = hidden.reshape(1, -1, hidden.shape[-1])
            logits = head.scale_and_cap(project_hidden(flat, head, vocabulary, arithmetic, buffer))
            return logits.view(*hidden.shape[:-1], vocabulary)

        return read


@dataclass(frozen=True)
class TeacherTarget:
    """The teachers that a divergence compares with, combined into one distribution.

    teachers: their numbers. One: its logits. Several: sum_i w_i softmax(z_i / T_i), or with `routed` for each
        row the teacher that the dataset names.
    weights: w_i, which sum to 1; empty: all alike. temperatures: T_i; empty: 1 each.
    """

    teachers: tuple[int, ...] = (0,)
    weights: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = ()
    routed: bool = False

    def combine_logits(self, teacher_logits: Callable[[int], Tensor], routes: Tensor | None) -> Tensor:
        """Return the target's logits, (m, n, V): one teacher's, a mixture's log, or those of each row's own.

        teacher_logits: returns the logits of a teacher by number. routes: (m, n), for each token the number
        of its row's teacher.
        """
        if self.routed:
            return self._route_logits(teacher_logits, routes)
        if len(self.teachers) == 1 and not self.temperatures:
            return teacher_logits(self.teachers[0])
        temperatures = self.temperatures or (1.0,) * len(self.teachers)
        weights = self.weights or (1 / len(self.teachers),) * len(self.teachers)
        mixed: Tensor | None = None
        for teacher, weight, temperature in zip(self.teachers, weights, temperatures, strict=True):
            weighted = log_probabilities(teacher_logits(teacher), temperature).add_(math.log(weight))
            mixed = weighted if mixed is None else torch.logaddexp(mixed, weighted)
        assert mixed is not None, "a target has a teacher"
        return mixed

    def _route_logits(self, teacher_logits: Callable[[int], Tensor], routes: Tensor | None) -> Tensor:
        """Return for each token its row's teacher's logits over that teacher's temperature, (m, n, V).

        Raises ValueError without routes.
        """
        if routes is None:
            raise ValueError("a routed divergence needs to know each row's teacher: give `routes`")
        temperatures = dict(zip(self.teachers, self.temperatures, strict=False))
        routed: Tensor | None = None
        for teacher in self.teachers:
            logits = teacher_logits(teacher) / temperatures.get(teacher, 1.0)
            routed = logits if routed is None else torch.where((routes == teacher)[..., None], logits, routed)
        assert routed is not None, "a target has a teacher"
        return routed


def select_block_rows(tensor: Tensor, block: int | slice | Tensor, rows: slice | Tensor) -> Tensor:
    """Return (n, ...) of a single block of a tensor (M, N, ...), or (m, n, ...) of several."""
    return tensor[block, rows] if isinstance(block, int) else tensor[block][:, rows]


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the hidden states (M, T, H) at each block's positions (M, N), as (M, N, H)."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def project_hidden(
    hidden: Tensor, head: Projection, vocabulary: int, arithmetic: MatmulPrecision, buffer: Tensor
) -> Tensor:
    """Return h W^T + b of hidden states (K, n, H), (K, n, V), unscaled; a view of the overwritten buffer."""
    raw = buffer[: hidden.shape[0] * hidden.shape[1] * vocabulary].view(*hidden.shape[:2], vocabulary)
    if head.weight is None:
        raw.copy_(hidden[..., :vocabulary])
    else:
        for span in arithmetic.split_rows(head.weight):
            arithmetic.multiply(hidden, head.weight[:, span].mT, raw[..., span])
    return raw if head.bias is None else raw.add_(head.bias[:, None])
