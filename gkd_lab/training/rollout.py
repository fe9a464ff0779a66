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
from gkd_lab.losses.step_loss import concatenate_blocks, split_blocks
from gkd_lab.models.forward import Sequences
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import derive_seed, draw_uniforms
from gkd_lab.training.sampling import generate_completions


@dataclass(frozen=True)
class MicroBatchPosition:
    """Where a micro-batch lies within its optimizer step, over all ranks."""

    step: int
    position: int
    n_micro_batches: int
    rank: int = 0
    world_size: int = 1
    rows_per_micro_batch: int = 1
    """Rows of a whole micro-batch; the last one of an epoch may have less."""

    def select_rows(self, step_noise: Tensor, rows: int) -> Tensor:
        """The share of this micro-batch in noise drawn for the whole step."""
        first = (self.position * self.world_size + self.rank) * self.rows_per_micro_batch
        return step_noise[first : first + rows]

    def count_step_rows(self) -> int:
        return self.n_micro_batches * self.world_size * self.rows_per_micro_batch


@dataclass(frozen=True)
class GenerationLimits:
    """What holds for everything that is written."""

    max_new_tokens: int
    end_ids: Tensor
    pad_id: int
    vocabulary_size: int | None = None
    """Only these first entries may be written; None: all."""


def sample_student_completions(
    pack: Pack,
    cells: Sequence[CellArguments],
    on_policy_cells: Sequence[int],
    prompts: Mapping[int, Sequences],
    position: MicroBatchPosition,
    limits: GenerationLimits,
    purpose: str = "sampling",
    dtype: torch.dtype | None = None,
) -> dict[int, Sequences]:
    """What the students of the cells `writing` answer to their seed's prompts: cell -> B rows.

    dtype: to what the forward pass casts by itself, under autocast.
    """
    if not on_policy_cells:
        return {}
    of_cells = [prompts[cells[n].seed] for n in on_policy_cells]
    rows = of_cells[0].num_rows
    noise = {
        seed: position.select_rows(
            draw_uniforms(seed, position.step, purpose, position.count_step_rows(), limits.max_new_tokens),
            rows,
        )
        for seed in {cells[n].seed for n in on_policy_cells}
    }
    temperature = torch.tensor([cells[n].temperature for n in on_policy_cells])
    with pack.select_cells(on_policy_cells, dtype) as model:
        answers = generate_completions(
            model,
            concatenate_blocks(of_cells, limits.pad_id),
            max_new_tokens=limits.max_new_tokens,
            end_ids=limits.end_ids,
            pad_id=limits.pad_id,
            uniforms=torch.cat([noise[cells[n].seed] for n in on_policy_cells]),
            temperature=temperature.repeat_interleave(rows)[:, None],
            vocabulary_size=limits.vocabulary_size,
        )
    return dict(zip(on_policy_cells, split_blocks(answers, len(on_policy_cells)), strict=True))


class TeacherCompletions:
    """TRL's `seq_kd`: the teacher's sampled answer takes the place of the data's, once per prompt.

    The noise is keyed by the prompt, so that a resumed run gets the same text without a file.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        limits: GenerationLimits,
        temperature: float,
        seed: int,
        is_true_on_any_rank: Callable[[bool], bool] = bool,
    ) -> None:
        self.teacher, self.limits = teacher, limits
        self.temperature, self.seed = temperature, seed
        self.is_true_on_any_rank = is_true_on_any_rank
        self.completion_cache: dict[tuple[int, ...], list[int]] = {}

    def replace_completions(self, fixed: Sequences) -> Sequences:
        """The same prompts with the teacher's completions."""
        prompts = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(fixed.prompt_ids, fixed.prompt_mask, strict=True)
        ]
        new = [n for n, prompt in enumerate(prompts) if prompt not in self.completion_cache]
        if self.is_true_on_any_rank(bool(new)):
            # A sharded teacher needs all ranks at once, so a rank without a new prompt asks again for one.
            new = new or [0]
            answers = self._sample_completions(
                fixed.map_tensors(lambda tensor: tensor[new]), [prompts[n] for n in new]
            )
            for n, ids, mask in zip(new, answers.completion_ids, answers.completion_mask, strict=True):
                self.completion_cache[prompts[n]] = ids[mask.bool()].tolist()
        return _set_completions(
            fixed, [self.completion_cache[prompt] for prompt in prompts], self.limits.pad_id
        )

    def _sample_completions(self, prompts: Sequences, texts: Sequence[tuple[int, ...]]) -> Sequences:
        noise = [
            draw_uniforms(
                derive_seed(self.seed, _hash_prompt(text), "teacher"),
                0,
                "sampling",
                1,
                self.limits.max_new_tokens,
            )
            for text in texts
        ]
        return generate_completions(
            self.teacher,
            prompts,
            max_new_tokens=self.limits.max_new_tokens,
            end_ids=self.limits.end_ids,
            pad_id=self.limits.pad_id,
            uniforms=torch.cat(noise),
            temperature=self.temperature,
            vocabulary_size=self.limits.vocabulary_size,
        )


def _hash_prompt(ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(ids).encode(), digest_size=8).digest(), "big")


def _set_completions(fixed: Sequences, answers: Sequence[list[int]], pad_id: int) -> Sequences:
    width = max(1, *(len(answer) for answer in answers))
    ids = fixed.prompt_ids.new_full((len(answers), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = ids.new_tensor(answer)
        mask[row, : len(answer)] = 1
    return fixed.replace_completions(ids, mask)
