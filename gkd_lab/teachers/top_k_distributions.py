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
from gkd_lab.losses.teacher_targets import LogitReader, TeacherLogits, gather_positions


@dataclass(frozen=True)
class TopKScores:
    """What is kept of distributions over a vocabulary.

    logs: (..., k) log-probabilities, the largest first; with k = V in the order of the vocabulary.
    ids: (..., k), whose they are; None: with k = V those of all tokens.
    tail: (...), log of the probability of all other tokens together; None with k = V.
    """

    log_probs: Tensor
    ids: Tensor | None = None
    tail_log_prob: Tensor | None = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> "TopKScores":
        """The same change to all that is there."""
        ids, tail = self.ids, self.tail_log_prob
        return TopKScores(
            change(self.log_probs),
            None if ids is None else change(ids),
            None if tail is None else change(tail),
        )

    def split(self, lengths: Sequence[int]) -> list["TopKScores"]:
        """So many tokens each, one after another."""
        ends = accumulate(lengths)
        return [
            self.apply(itemgetter(slice(end - length, end)))
            for end, length in zip(ends, lengths, strict=True)
        ]


def select_top_k(logits: Tensor, top_k: int | None, dtype: torch.dtype) -> TopKScores:
    """Of logits (n, V) the k most likely tokens; None, or V and more: all of them. ids are int32.

    The mass of the others is summed by itself: 1 minus the sum of the named would keep none of its digits.
    """
    logs = log_probabilities(logits)
    if top_k is None or top_k >= logs.shape[-1]:
        return TopKScores(_convert_dtype(logs, dtype))
    top, ids = logs.topk(top_k)
    tail = logs.scatter(-1, ids, -math.inf).logsumexp(-1)
    return TopKScores(_convert_dtype(top, dtype), ids.int(), _convert_dtype(tail, dtype))


def _convert_dtype(logs: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the store, never -inf, of which differences are no numbers."""
    return logs.clamp_min(torch.finfo(dtype).min / 8).to(dtype)


@dataclass(frozen=True)
class TopKTeacherLogits:
    """A `TeacherLogits` of kept distributions.

    logs: (M, N, k). ids: (M, N, k), or None with k = V. others: (M, N), log-probability of each token that is
    not named, or None with k = V. size: V.
    """

    log_probs: Tensor
    ids: Tensor | None
    unnamed_log_prob: Tensor | None
    vocabulary_size: int

    @classmethod
    def create(cls, scores: TopKScores, size: int) -> "TopKTeacherLogits":
        """Scores of (M, N) tokens, their tail spread evenly.

        Raises:
            ValueError: if all tokens seem to be named, but are not in the order of the vocabulary.
        """
        if scores.ids is None:
            return cls(scores.log_probs, None, None, size)
        unnamed = size - scores.ids.shape[-1]
        if unnamed < 1 or scores.tail_log_prob is None:
            raise ValueError(
                f"{scores.ids.shape[-1]} tokens of a vocabulary of {size} are named, which leaves none to be "
                "the tail: give the log-probabilities of all, in the order of the vocabulary, without ids"
            )
        return cls(scores.log_probs, scores.ids, scores.tail_log_prob - math.log(unnamed), size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.log_probs.shape[0], self.log_probs.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.log_probs.dtype

    @property
    def vocabulary(self) -> int:
        return self.vocabulary_size

    def select_positions(self, positions: Tensor) -> "TopKTeacherLogits":
        ids = None if self.ids is None else gather_positions(self.ids, positions)
        others = None if self.unnamed_log_prob is None else self.unnamed_log_prob.gather(1, positions)
        return TopKTeacherLogits(
            gather_positions(self.log_probs, positions), ids, others, self.vocabulary_size
        )

    def create_reader(self, vocabulary: int, dtype: torch.dtype, max_rows: int) -> LogitReader:
        logs, ids, others = self.log_probs, self.ids, self.unnamed_log_prob
        if ids is None or others is None:
            return lambda block, rows: logs[block, rows, :vocabulary].to(dtype)
        buffer = logs.new_empty((max_rows, self.vocabulary_size), dtype=dtype)

        def read(block: int, rows: Tensor) -> Tensor:
            logits = buffer[: len(rows)]
            logits.copy_(others[block, rows, None].expand_as(logits))
            logits.scatter_(1, ids[block, rows].long(), logs[block, rows].to(dtype))
            return logits[:, :vocabulary]

        return read


def compute_top_k_scores(
    guide: TeacherLogits, top_k: int | None, dtype: torch.dtype, chunk_bytes: int
) -> TopKScores:
    """What to keep of the tokens of a guide's only block, (N, k), in chunks of its logits; on the CPU."""
    size, tokens = guide.vocabulary, guide.shape[1]
    wide = torch.promote_types(guide.dtype, torch.float32)
    longest = max(1, min(tokens, chunk_bytes // (size * wide.itemsize)))
    read = guide.create_reader(size, wide, longest)
    parts = [
        select_top_k(read(0, rows), top_k, dtype).apply(Tensor.cpu)
        for rows in torch.arange(tokens).split(longest)
    ]
    return concatenate_scores(parts)


def concatenate_scores(parts: Sequence[TopKScores]) -> TopKScores:
    """One under the other."""
    ids = [part.ids for part in parts if part.ids is not None]
    tails = [part.tail_log_prob for part in parts if part.tail_log_prob is not None]
    return TopKScores(
        torch.cat([part.log_probs for part in parts]),
        torch.cat(ids) if ids else None,
        torch.cat(tails) if tails else None,
    )
