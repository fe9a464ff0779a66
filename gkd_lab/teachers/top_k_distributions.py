"""A teacher's distributions as they are stored or sent: the most likely tokens, and the mass of all others.

The mass of the tail is spread evenly over the tokens that are not named. That keeps a full distribution,
which every divergence and temperature can read, and leaves the named probabilities as they are. The
alternatives lose
more: without the tail, renormalised, the student learns that all other tokens are impossible, which reverse
KL and JSD punish without bound or by log 2; one bucket for all others, of both models, is blind to what the
student does within it.

With k = V nothing is spread, and everything is exact but for the rounding of the stored values. With k < V
the
named probabilities are exact at temperature 1 only: softmax(log p / T) is normalised over a tail that is
flatter than the teacher's, which has too much mass for T above 1 and too little below. Reverse KL, which
reads the teacher's probabilities of the student's favourites, needs more tokens than forward KL
(benchmarks/top_k.py).

Shapes: M blocks of N tokens, n of them in a chunk, k named tokens, V vocabulary, R rows of C tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor

from gkd_lab.losses.divergence import log_probabilities
from gkd_lab.losses.teacher_targets import LogitReader, TeacherLogits, gather_positions, select_block_rows


@dataclass(frozen=True)
class TopKScores:
    """Log-probabilities of the most likely tokens.

    log_probs: (..., k), the largest first; with k = V in the order of the vocabulary.
    ids: (..., k), the tokens; None: with k = V all tokens.
    tail_log_prob: (...), log of the probability of all other tokens together; None with k = V.
    """

    log_probs: Tensor
    ids: Tensor | None = None
    tail_log_prob: Tensor | None = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> "TopKScores":
        """Return new scores with `change` applied to each tensor that is not None."""
        ids, tail = self.ids, self.tail_log_prob
        return TopKScores(
            change(self.log_probs),
            None if ids is None else change(ids),
            None if tail is None else change(tail),
        )

    def split(self, lengths: Sequence[int]) -> list["TopKScores"]:
        """Return consecutive parts of these numbers of tokens, along the first axis."""
        ends = accumulate(lengths)
        return [
            self.apply(itemgetter(slice(end - length, end)))
            for end, length in zip(ends, lengths, strict=True)
        ]


def select_top_k(logits: Tensor, top_k: int | None, dtype: torch.dtype) -> TopKScores:
    """Return the scores of the k most likely tokens of logits (n, V), of all V if `top_k` is None or larger.

    ids are int32, log-probabilities in `dtype`. The mass of the others is summed by itself: 1 minus the sum
    of the named would keep none of its digits.
    """
    log_probs = log_probabilities(logits)
    if top_k is None or top_k >= log_probs.shape[-1]:
        return TopKScores(_convert_dtype(log_probs, dtype))
    top, ids = log_probs.topk(top_k)
    tail = log_probs.scatter(-1, ids, -math.inf).logsumexp(-1)
    return TopKScores(_convert_dtype(top, dtype), ids.int(), _convert_dtype(tail, dtype))


def _convert_dtype(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast log-probabilities for storage; -inf becomes a finite value, as its differences would be NaN."""
    return log_probs.clamp_min(torch.finfo(dtype).min / 8).to(dtype)


@dataclass(frozen=True)
class TopKTeacherLogits:
    """`TeacherLogits` of stored distributions.

    log_probs: (M, N, k).
    ids: (M, N, k); None with k = V.
    unnamed_log_prob: (M, N), log-probability of each token that is not named; None with k = V.
    vocabulary: V.
    """

    log_probs: Tensor
    ids: Tensor | None
    unnamed_log_prob: Tensor | None
    vocabulary: int

    @classmethod
    def create(cls, scores: TopKScores, vocabulary: int) -> "TopKTeacherLogits":
        """Return logits of the scores of (M, N) tokens; the tail is spread evenly over unnamed tokens.

        Raises:
            ValueError: if all tokens seem to be named, but are not in the order of the vocabulary.
        """
        if scores.ids is None:
            return cls(scores.log_probs, None, None, vocabulary)
        n_unnamed = vocabulary - scores.ids.shape[-1]
        if n_unnamed < 1 or scores.tail_log_prob is None:
            raise ValueError(
                f"{scores.ids.shape[-1]} tokens of a vocabulary of {vocabulary} are named, which leaves none "
                "to be the tail: give the log-probabilities of all, in the order of the vocabulary, without "
                "ids"
            )
        return cls(scores.log_probs, scores.ids, scores.tail_log_prob - math.log(n_unnamed), vocabulary)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks and of tokens in each, (M, N)."""
        return self.log_probs.shape[0], self.log_probs.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored log-probabilities."""
        return self.log_probs.dtype

    def select_positions(self, positions: Tensor) -> "TopKTeacherLogits":
        """Return the distributions at these positions of each block alone, (M, N')."""
        ids = None if self.ids is None else gather_positions(self.ids, positions)
        unnamed = None if self.unnamed_log_prob is None else self.unnamed_log_prob.gather(1, positions)
        return TopKTeacherLogits(gather_positions(self.log_probs, positions), ids, unnamed, self.vocabulary)

    def create_reader(self, vocabulary: int, dtype: torch.dtype, max_rows: int) -> LogitReader:
        """Return a reader, (block, rows) -> log-probabilities (n, vocabulary) as logits, the tail filled in.

        Each call may overwrite the logits of the one before.
        """
        log_probs, ids, unnamed = self.log_probs, self.ids, self.unnamed_log_prob
        if ids is None or unnamed is None:
            return lambda block, rows: select_block_rows(log_probs, block, rows)[..., :vocabulary].to(dtype)
        buffer = log_probs.new_empty((max_rows, self.vocabulary), dtype=dtype)

        def read_logits(block: int | slice | Tensor, rows: slice | Tensor) -> Tensor:
            """Fill the buffer with the blocks' rows, tail included, and return its view."""
            named, tails = select_block_rows(log_probs, block, rows), select_block_rows(unnamed, block, rows)
            logits = buffer[: tails.numel()].view(*tails.shape, self.vocabulary)
            logits.copy_(tails[..., None].expand_as(logits))
            logits.scatter_(-1, select_block_rows(ids, block, rows).long(), named.to(dtype))
            return logits[..., :vocabulary]

        return read_logits


def compute_top_k_scores(
    logits: TeacherLogits, top_k: int | None, dtype: torch.dtype, chunk_bytes: int
) -> TopKScores:
    """Return the top-k scores, (N, k), of a single block of teacher logits, read in chunks; on the CPU."""
    vocabulary, tokens = logits.vocabulary, logits.shape[1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    chunk_rows = max(1, min(tokens, chunk_bytes // (vocabulary * wide.itemsize)))
    read_logits = logits.create_reader(vocabulary, wide, chunk_rows)
    parts = [
        select_top_k(read_logits(0, rows), top_k, dtype).apply(Tensor.cpu)
        for rows in torch.arange(tokens).split(chunk_rows)
    ]
    return concatenate_scores(parts)


def concatenate_scores(parts: Sequence[TopKScores]) -> TopKScores:
    """Return the scores joined along the first axis, in order."""
    ids = [part.ids for part in parts if part.ids is not None]
    tails = [part.tail_log_prob for part in parts if part.tail_log_prob is not None]
    return TopKScores(
        torch.cat([part.log_probs for part in parts]),
        torch.cat(ids) if ids else None,
        torch.cat(tails) if tails else None,
    )
