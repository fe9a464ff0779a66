"""Choose the next token of every row, and the rows to go on with.

Sampling inverts the cumulative distribution at one uniform number per row and token, so that rows may be
batched, padded and packed in any way and still get the same tokens.
Shapes: N rows, n of them in a batch, C new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TokenChooser = Callable[[Tensor, Tensor, int], Tensor]
"""(scores (n, V), row numbers (n,) in the first batch, position of the new token) -> tokens (n,)."""

SHRINK_THRESHOLD = 0.75
"""Finished rows leave the batch once at most this share is unfinished: each time copies the cache once."""


def choose_most_likely(scores: Tensor, rows: Tensor, position: int) -> Tensor:
    """Return the id of each row's highest score, (n,): greedy search; `rows` and `position` are not used."""
    return scores.argmax(-1)


@dataclass(frozen=True)
class InverseCdfSampler:
    """Samples the token at which the cumulative distribution passes the row's uniform number.

    Attributes:
        uniforms: (N, C), one number per row and new token.
        temperature: Of all rows, or (N, 1).
        vocabulary: Only the first entries may be sampled; None: all.
    """

    uniforms: Tensor
    temperature: float | Tensor
    vocabulary: int | None = None

    def __call__(self, scores: Tensor, rows: Tensor, position: int) -> Tensor:
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(scores.device)[rows]
        uniforms = self.uniforms.to(scores.device)[rows, position, None]
        return invert_cumulative(scores[:, : self.vocabulary], temperature, uniforms)


def invert_cumulative(scores: Tensor, temperature: float | Tensor, uniforms: Tensor) -> Tensor:
    """Return the tokens (n,) at which the cumulative distributions of scores (n, V) pass `uniforms` (n, 1).

    `temperature` is one for all rows or (n, 1). The sum is in float64, the softmax at least in float32.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if isinstance(temperature, Tensor) or temperature != 1:
        wide = wide / torch.as_tensor(temperature).to(wide)
    cumulative = wide.softmax(-1).cumsum(-1, dtype=torch.float64)
    passed = uniforms * cumulative[:, -1:]
    return torch.searchsorted(cumulative, passed, right=True)[:, 0].clamp_max(scores.shape[-1] - 1)


def select_unfinished_rows(has_finished: Sequence[bool], n_cells: int) -> list[int] | None:
    """Return indices of the rows to go on with, equally many a cell; None (keep all) if too few finished.

    Rows are those of the first cell, then those of the next, and stay in their order.
    """
    rows_per_cell = len(has_finished) // n_cells
    blocks = [range(first, first + rows_per_cell) for first in range(0, len(has_finished), rows_per_cell)]
    needed = max(sum(not has_finished[n] for n in block) for block in blocks)
    if needed > SHRINK_THRESHOLD * rows_per_cell:
        return None
    # A cell with fewer unfinished rows goes on with the first of its finished ones.
    return [n for block in blocks for n in sorted(sorted(block, key=has_finished.__getitem__)[:needed])]
