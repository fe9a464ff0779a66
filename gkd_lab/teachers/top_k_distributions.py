"""A teacher's distributions as they were kept or sent: its most likely tokens, and the mass of all others.

The tail's mass is spread evenly over the tokens that are not named. That keeps a full distribution, which
every divergence and temperature can read, and leaves the named probabilities as they are. The alternatives
lose more: without the tail, renormalised, the student learns that all other tokens are impossible, which
reverse KL and JSD punish without bound or by log 2; one bucket for all others, of both models, says nothing
of what the student does within it.

With k = V nothing is spread, and everything is exact but for the rounding of what is stored. With k < V the
named probabilities are exact at temperature 1. At another one they are not, as softmax(log p / T) is
normalised over a tail that is flatter than the teacher's: above 1 it has too much mass, below 1 too little.
Reverse KL, which asks for the teacher's opinion of what the student likes, needs more tokens than forward KL
(benchmarks/top_k.py).

Shapes: M blocks of N tokens, n of them in a chunk, k tokens named, V vocabulary, R rows of C tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor

from gkd_lab.losses.divergence import log_probabilities
from gkd_lab.losses.teacher_targets import Guide, Read, gathered


@dataclass(frozen=True)
class Scores:
    """What is kept of distributions over a vocabulary.

    logs: (..., k) log-probabilities, the largest first; with k = V in the order of the vocabulary.
    ids: (..., k), whose they are; None: with k = V those of all tokens.
    tail: (...), log of the probability of all other tokens together; None with k = V.
    """

    logs: Tensor
    ids: Tensor | None = None
    tail: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Scores":
        """The same change to all that is there."""
        ids, tail = self.ids, self.tail
        return Scores(
            change(self.logs), None if ids is None else change(ids), None if tail is None else change(tail)
        )

    def split(self, lengths: Sequence[int]) -> list["Scores"]:
        """So many tokens each, one after another."""
        ends = accumulate(lengths)
        return [
            self.map(itemgetter(slice(end - length, end))) for end, length in zip(ends, lengths, strict=True)
        ]


def top_scores(logits: Tensor, top_k: int | None, dtype: torch.dtype) -> Scores:
    """Of logits (n, V) the k most likely tokens; None, or V and more: all of them. ids are int32.

    The mass of the others is summed by itself: 1 minus the sum of the named would keep none of its digits.
    """
    logs = log_probabilities(logits)
    if top_k is None or top_k >= logs.shape[-1]:
        return Scores(_kept(logs, dtype))
    top, ids = logs.topk(top_k)
    tail = logs.scatter(-1, ids, -math.inf).logsumexp(-1)
    return Scores(_kept(top, dtype), ids.int(), _kept(tail, dtype))


def _kept(logs: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the store, never -inf, of which differences are no numbers."""
    return logs.clamp_min(torch.finfo(dtype).min / 8).to(dtype)


@dataclass(frozen=True)
class Stored:
    """A `Guide` of kept distributions.

    logs: (M, N, k). ids: (M, N, k), or None with k = V. others: (M, N), log-probability of each token that is
    not named, or None with k = V. size: V.
    """

    logs: Tensor
    ids: Tensor | None
    others: Tensor | None
    size: int

    @classmethod
    def of(cls, scores: Scores, size: int) -> "Stored":
        """Scores of (M, N) tokens, their tail spread evenly.

        Raises:
            ValueError: if all tokens seem to be named, but are not in the order of the vocabulary.
        """
        if scores.ids is None:
            return cls(scores.logs, None, None, size)
        unnamed = size - scores.ids.shape[-1]
        if unnamed < 1 or scores.tail is None:
            raise ValueError(
                f"{scores.ids.shape[-1]} tokens of a vocabulary of {size} are named, which leaves none to be "
                "the tail: give the log-probabilities of all, in the order of the vocabulary, without ids"
            )
        return cls(scores.logs, scores.ids, scores.tail - math.log(unnamed), size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.logs.shape[0], self.logs.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.logs.dtype

    @property
    def vocabulary(self) -> int:
        return self.size

    def chosen(self, positions: Tensor) -> "Stored":
        ids = None if self.ids is None else gathered(self.ids, positions)
        others = None if self.others is None else self.others.gather(1, positions)
        return Stored(gathered(self.logs, positions), ids, others, self.size)

    def reader(self, vocabulary: int, wide: torch.dtype, longest: int) -> Read:
        logs, ids, others = self.logs, self.ids, self.others
        if ids is None or others is None:
            return lambda block, rows: logs[block, rows, :vocabulary].to(wide)
        buffer = logs.new_empty((longest, self.size), dtype=wide)

        def read(block: int, rows: Tensor) -> Tensor:
            logits = buffer[: len(rows)]
            logits.copy_(others[block, rows, None].expand_as(logits))
            logits.scatter_(1, ids[block, rows].long(), logs[block, rows].to(wide))
            return logits[:, :vocabulary]

        return read


def kept_of(guide: Guide, top_k: int | None, dtype: torch.dtype, chunk_bytes: int) -> Scores:
    """What to keep of the tokens of a guide's only block, (N, k), in chunks of its logits; on the CPU."""
    size, tokens = guide.vocabulary, guide.shape[1]
    wide = torch.promote_types(guide.dtype, torch.float32)
    longest = max(1, min(tokens, chunk_bytes // (size * wide.itemsize)))
    read = guide.reader(size, wide, longest)
    parts = [
        top_scores(read(0, rows), top_k, dtype).map(Tensor.cpu)
        for rows in torch.arange(tokens).split(longest)
    ]
    return joined(parts)


def joined(parts: Sequence[Scores]) -> Scores:
    """One under the other."""
    ids = [part.ids for part in parts if part.ids is not None]
    tails = [part.tail for part in parts if part.tail is not None]
    return Scores(
        torch.cat([part.logs for part in parts]),
        torch.cat(ids) if ids else None,
        torch.cat(tails) if tails else None,
    )
