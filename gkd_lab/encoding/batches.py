"""Rows to tensors, and which rows a step sees: a function of (seed, step), not of a generator's state."""

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
    """Token ids of one row; the completion ends with the end of sequence unless it was cut.

    number: the row's place in the data, by which scores that were kept of it are found; -1: it has none.
    route: the number of the teacher that the row is meant for; -1: of any.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    number: int = -1
    route: int = -1


@dataclass(frozen=True)
class TruncationCounts:
    """How many rows were longer than the limits, apart for prompt and target."""

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
    """(prompt, target) texts as ids; each is cut on its own: a decoder's prompt keeps its end.

    The target ends with the end of sequence, which counts against its limit.
    """
    kind = {"is_encoder_decoder": is_encoder_decoder}
    prompts = tokenize_prompts(tokenizer, [p for p, _ in rows], **kind)
    found = tokenize_targets(tokenizer, [t for _, t in rows], **kind)
    targets = [ensure_end_id(target, [tokenizer.eos_token_id]) for target in found]
    examples = [
        Example(truncate_prompt(tokenizer, prompt, max_input_tokens, **kind), target[:max_output_tokens])
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    cut = TruncationCounts(
        rows=len(rows),
        prompts=sum(len(p) > max_input_tokens for p in prompts),
        completions=sum(len(t) > max_output_tokens for t in targets),
    )
    return examples, cut


def collate_examples(examples: Sequence[Example], pad_id: int, *, is_encoder_decoder: bool) -> Sequences:
    """Examples as padded tensors: a decoder's prompts on the left, everything else on the right."""
    prompts = _pad_rows([e.prompt_ids for e in examples], pad_id, left=not is_encoder_decoder)
    completions = _pad_rows([e.completion_ids for e in examples], pad_id, left=False)
    routes, numbers = ([getattr(example, name) for example in examples] for name in ("route", "number"))
    return Sequences(
        *prompts, *completions, routes=_make_index_column(routes), numbers=_make_index_column(numbers)
    )


def _make_index_column(indices: Sequence[int]) -> Tensor | None:
    """(N, 1); None where no row has such a number."""
    return torch.tensor(indices)[:, None] if any(number >= 0 for number in indices) else None


def _pad_rows(rows: Sequence[list[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for position, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[position, place] = torch.tensor(row, dtype=torch.long)
        mask[position, place] = 1
    return ids, mask


@dataclass(frozen=True)
class Collator:
    """Rows of any kind as one batch: our own four tensors, and TRL's five for whoever reads those."""

    encode_row: Callable[[Any], Example]
    pad_id: int
    is_encoder_decoder: bool

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        examples = [self.encode_row(row) for row in rows]
        batch = collate_examples(examples, self.pad_id, is_encoder_decoder=self.is_encoder_decoder)
        if all(isinstance(row, Example) for row in rows):
            return batch.named_tensors()
        return {**batch.named_tensors(), **build_trl_batch(batch, is_encoder_decoder=self.is_encoder_decoder)}


class EpochCallback(TrainerCallback):
    """Tells `batches` each epoch's number: the Trainer's own call may end at accelerate's wrappers."""

    batch_sampler: "KeyedBatchSampler | None" = None

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(int(state.epoch or 0))


class KeyedBatchSampler(Sampler[list[int]]):
    """Batches of row numbers: for each seed `batch_size` rows of that seed's own order, one after another.

    An epoch is one pass over the data; with `drop_last` what is left over at its end is dropped. Without
    `shuffled` every seed has the data's order.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seeds: Sequence[int],
        *,
        drop_last: bool = True,
        shuffled: bool = True,
    ) -> None:
        self.num_rows, self.rows_per_seed, self.seeds = num_rows, batch_size, tuple(seeds)
        self.batch_size, self.drop_last, self.shuffled = batch_size * len(self.seeds), drop_last, shuffled
        self.epoch = 0
        self.length = num_rows // batch_size if drop_last else math.ceil(num_rows / batch_size)
        if self.length == 0:
            raise ValueError(f"{num_rows} rows are fewer than one batch of {batch_size}")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        orders = [self._order_rows(seed) for seed in self.seeds]
        for batch in range(self.length):
            part = slice(batch * self.rows_per_seed, (batch + 1) * self.rows_per_seed)
            yield [row for order in orders for row in order[part]]

    def _order_rows(self, seed: int) -> Sequence[int]:
        return draw_permutation(seed, self.epoch, self.num_rows) if self.shuffled else range(self.num_rows)
