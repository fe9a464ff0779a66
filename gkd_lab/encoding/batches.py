"""Pad encoded rows into batches, and sample batches in an order that depends on (seed, epoch) alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState

from gkd_lab.encoding.tokenization import ensure_end_id, tokenize_prompts, tokenize_targets, truncate_prompt
from gkd_lab.encoding.trl_batch import build_trl_batch
from gkd_lab.models.forward import Sequences
from gkd_lab.models.rng import draw_permutation


@dataclass(frozen=True)
class Example:
    """Token ids of one row; the completion ends with the end of sequence unless it was truncated.

    row_index: position in the dataset, the key of the row's cached teacher scores; -1: none.
    teacher_index: the teacher that the row is routed to; -1: not routed.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    row_index: int = -1
    teacher_index: int = -1


@dataclass(frozen=True)
class TruncationCounts:
    """Number of rows, of truncated prompts and of truncated completions."""

    rows: int
    prompts: int
    completions: int


def encode_rows(
    tokenizer: Any,
    rows: Sequence[tuple[str, str]],
    *,
    is_encoder_decoder: bool,
    max_input_tokens: int,
    max_output_tokens: int,
) -> tuple[list[Example], TruncationCounts]:
    """Encode (prompt, target) texts, truncated to the limits; return (examples, counts of truncated rows).

    A decoder's prompt loses its beginning, everything else its end. The target ends with the end of
    sequence, which counts against its limit.
    """
    kind = {"is_encoder_decoder": is_encoder_decoder}
    prompts = tokenize_prompts(tokenizer, [p for p, _ in rows], **kind)
    targets = [
        ensure_end_id(tokenizer, target, [tokenizer.eos_token_id])
        for target in tokenize_targets(tokenizer, [t for _, t in rows], **kind)
    ]
    examples = [
        Example(truncate_prompt(tokenizer, prompt, max_input_tokens, **kind), target[:max_output_tokens])
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    truncated = TruncationCounts(
        rows=len(rows),
        prompts=sum(len(p) > max_input_tokens for p in prompts),
        completions=sum(len(t) > max_output_tokens for t in targets),
    )
    return examples, truncated


def collate_examples(examples: Sequence[Example], pad_id: int, *, is_encoder_decoder: bool) -> Sequences:
    """Pad examples into one `Sequences`: a decoder's prompts on the left, everything else on the right."""
    prompts = _pad_rows([e.prompt_ids for e in examples], pad_id, left=not is_encoder_decoder)
    completions = _pad_rows([e.completion_ids for e in examples], pad_id, left=False)
    return Sequences(
        *prompts,
        *completions,
        teacher_indices=_make_index_column([e.teacher_index for e in examples]),
        row_indices=_make_index_column([e.row_index for e in examples]),
    )


def _make_index_column(indices: Sequence[int]) -> Tensor | None:
    """Return the indices as a column, (N, 1), or None if all are -1."""
    return torch.tensor(indices)[:, None] if any(index >= 0 for index in indices) else None


def _pad_rows(rows: Sequence[list[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (N, longest row), of lists of ids padded on the left or right."""
    width = max(1, *(len(row) for row in rows))

    def pad(row: list[int], value: int) -> list[int]:
        """Fill a row up to the width with a value."""
        padding = [value] * (width - len(row))
        return [*padding, *row] if left else [*row, *padding]

    # One tensor of all rows: filled row by row, it costs an operator for each of them.
    ids = torch.tensor([pad(row, pad_id) for row in rows], dtype=torch.long)
    return ids, torch.tensor([pad([1] * len(row), 0) for row in rows], dtype=torch.long)


@dataclass(frozen=True)
class Collator:
    """Data collator: encode rows, then return the tensors of `Sequences` and those of TRL's collator."""

    encode_row: Callable[[Any], Example]
    pad_id: int
    is_encoder_decoder: bool

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Encode and pad rows; rows that are examples already get no tensors of TRL's form."""
        examples = [self.encode_row(row) for row in rows]
        batch = collate_examples(examples, self.pad_id, is_encoder_decoder=self.is_encoder_decoder)
        if all(isinstance(row, Example) for row in rows):
            return batch.named_tensors()
        return {**batch.named_tensors(), **build_trl_batch(batch, is_encoder_decoder=self.is_encoder_decoder)}


class EpochCallback(TrainerCallback):
    """Set the sampler's epoch: the Trainer's own call may not get through accelerate's wrappers."""

    batch_sampler: "KeyedBatchSampler | None" = None

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Set the epoch of `batch_sampler`, if there is one, to the trainer's epoch, rounded down."""
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(int(state.epoch or 0))


class KeyedBatchSampler(Sampler[list[int]]):
    """Yield batches of row indices: `batch_size` rows for each seed, in that seed's random order.

    An epoch is one pass over the data; `drop_last` drops an incomplete last batch. Without `shuffled` the
    rows come in the dataset's order for every seed. With `copies` the dataset holds its `num_rows` rows so
    many times, one copy after the other with other completions, and an epoch takes the next copy.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seeds: Sequence[int],
        *,
        drop_last: bool = True,
        shuffled: bool = True,
        copies: int = 1,
    ) -> None:
        self.copies = copies
        self.num_rows, self.rows_per_seed, self.seeds = num_rows, batch_size, tuple(seeds)
        self.batch_size, self.drop_last, self.shuffled = batch_size * len(self.seeds), drop_last, shuffled
        self.epoch = 0
        self.length = num_rows // batch_size if drop_last else math.ceil(num_rows / batch_size)
        if self.length == 0:
            raise ValueError(f"{num_rows} rows are fewer than one batch of {batch_size}")

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which together with each seed determines the order of the rows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row indices of each batch of this epoch, one block per seed."""
        orders = [self._order_rows(seed) for seed in self.seeds]
        for start in range(0, self.length * self.rows_per_seed, self.rows_per_seed):
            yield [row for order in orders for row in order[start : start + self.rows_per_seed]]

    def _order_rows(self, seed: int) -> Sequence[int]:
        """Return all row indices in this epoch's random order for one seed; in order unless `shuffled`."""
        order = draw_permutation(seed, self.epoch, self.num_rows) if self.shuffled else range(self.num_rows)
        offset = self.epoch % self.copies * self.num_rows
        return [row + offset for row in order] if offset else order
