"""Who writes the sequence of a step: the students whose coin says so, or the teacher in place of the data.

Noise is keyed by seed, step and row, never by rank, micro-batch or pack, so that the same step samples the
same text however it is split.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.step_loss import blocks, joined
from gkd_lab.models.forward import Sequences
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import key, uniforms
from gkd_lab.training.sampling import write


@dataclass(frozen=True)
class Place:
    """Where a micro-batch lies within its optimizer step, over all ranks."""

    step: int
    position: int
    batches: int
    rank: int = 0
    world: int = 1
    stride: int = 1
    """Rows of a whole micro-batch; the last one of an epoch may have less."""

    def rows_of(self, drawn: Tensor, rows: int) -> Tensor:
        """The share of this micro-batch in noise drawn for the whole step."""
        first = (self.position * self.world + self.rank) * self.stride
        return drawn[first : first + rows]

    def all_rows(self) -> int:
        return self.batches * self.world * self.stride


@dataclass(frozen=True)
class Limits:
    """What holds for everything that is written."""

    max_new_tokens: int
    end_ids: Tensor
    pad_id: int
    vocabulary: int | None = None
    """Only these first entries may be written; None: all."""


def write_with_generate(
    pack: Pack,
    cells: Sequence[CellArguments],
    writing: Sequence[int],
    prompts: Mapping[int, Sequences],
    place: Place,
    limits: Limits,
    purpose: str = "sampling",
    dtype: torch.dtype | None = None,
) -> dict[int, Sequences]:
    """What the students of the cells `writing` answer to their seed's prompts: cell -> B rows.

    dtype: to what the forward pass casts by itself, under autocast.
    """
    if not writing:
        return {}
    of_cells = [prompts[cells[n].seed] for n in writing]
    rows = of_cells[0].rows
    noise = {
        seed: place.rows_of(
            uniforms(seed, place.step, purpose, place.all_rows(), limits.max_new_tokens), rows
        )
        for seed in {cells[n].seed for n in writing}
    }
    temperature = torch.tensor([cells[n].temperature for n in writing])
    with pack.only(writing, dtype) as model:
        answers = write(
            model,
            joined(of_cells, limits.pad_id),
            max_new_tokens=limits.max_new_tokens,
            end_ids=limits.end_ids,
            pad_id=limits.pad_id,
            uniforms=torch.cat([noise[cells[n].seed] for n in writing]),
            temperature=temperature.repeat_interleave(rows)[:, None],
            vocabulary=limits.vocabulary,
        )
    return dict(zip(writing, blocks(answers, len(writing)), strict=True))


class TeacherText:
    """TRL's `seq_kd`: the teacher's sampled answer takes the place of the data's, once per prompt.

    The noise is keyed by the prompt, so that a resumed run gets the same text without a file.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        limits: Limits,
        temperature: float,
        seed: int,
        on_any_rank: Callable[[bool], bool] = bool,
    ) -> None:
        self.teacher, self.limits = teacher, limits
        self.temperature, self.seed = temperature, seed
        self.on_any_rank = on_any_rank
        self.written: dict[tuple[int, ...], list[int]] = {}

    def in_place_of(self, fixed: Sequences) -> Sequences:
        """The same prompts with the teacher's completions."""
        prompts = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(fixed.prompt_ids, fixed.prompt_mask, strict=True)
        ]
        new = [n for n, prompt in enumerate(prompts) if prompt not in self.written]
        if self.on_any_rank(bool(new)):
            # A sharded teacher needs all ranks at once, so a rank without a new prompt asks again for one.
            new = new or [0]
            answers = self._ask(fixed.map(lambda tensor: tensor[new]), [prompts[n] for n in new])
            for n, ids, mask in zip(new, answers.completion_ids, answers.completion_mask, strict=True):
                self.written[prompts[n]] = ids[mask.bool()].tolist()
        return _with_answers(fixed, [self.written[prompt] for prompt in prompts], self.limits.pad_id)

    def _ask(self, prompts: Sequences, texts: Sequence[tuple[int, ...]]) -> Sequences:
        noise = [
            uniforms(key(self.seed, _digest(text), "teacher"), 0, "sampling", 1, self.limits.max_new_tokens)
            for text in texts
        ]
        return write(
            self.teacher,
            prompts,
            max_new_tokens=self.limits.max_new_tokens,
            end_ids=self.limits.end_ids,
            pad_id=self.limits.pad_id,
            uniforms=torch.cat(noise),
            temperature=self.temperature,
            vocabulary=self.limits.vocabulary,
        )


def _digest(ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(ids).encode(), digest_size=8).digest(), "big")


def _with_answers(fixed: Sequences, answers: Sequence[list[int]], pad_id: int) -> Sequences:
    width = max(1, *(len(answer) for answer in answers))
    ids = fixed.prompt_ids.new_full((len(answers), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = ids.new_tensor(answer)
        mask[row, : len(answer)] = 1
    return fixed.with_completions(ids, mask)
