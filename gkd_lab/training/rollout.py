"""Sampling of completions in a training step: by the on-policy students, or by the teacher (`seq_kd`).

Noise is keyed by seed, step and row, never by rank, micro-batch or pack, so that a step samples the same text
however it is split.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_lab.losses.cell_arguments import CellArguments, distinct_seeds
from gkd_lab.losses.step_loss import concatenate_blocks, split_blocks
from gkd_lab.models.forward import Sequences
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import derive_seed, draw_uniforms
from gkd_lab.training.sampling import generate_completions


@dataclass(frozen=True)
class MicroBatchPosition:
    """Position of a micro-batch within its optimizer step, over all ranks."""

    step: int
    position: int
    n_micro_batches: int
    rank: int = 0
    world_size: int = 1
    rows_per_micro_batch: int = 1
    """Rows of a full micro-batch; the last one of an epoch may have fewer."""

    def slice_noise(self, step_noise: Tensor, n_rows: int) -> Tensor:
        """Return this micro-batch's `n_rows` rows, on this rank, of the noise drawn for the whole step."""
        first = (self.position * self.world_size + self.rank) * self.rows_per_micro_batch
        return step_noise[first : first + n_rows]

    def count_step_rows(self) -> int:
        """Return the row count of the whole step, over micro-batches and ranks, as if all were full."""
        return self.n_micro_batches * self.world_size * self.rows_per_micro_batch


@dataclass(frozen=True)
class GenerationLimits:
    """Token ids and lengths that hold for everything that is sampled in a training."""

    max_new_tokens: int
    end_ids: Tensor
    pad_id: int
    vocabulary_size: int | None = None
    """Only these first vocabulary entries may be sampled; None: all."""


class StudentSampler(Protocol):
    """Samples the completions of the on-policy students."""

    def sample(
        self,
        cells: Sequence[CellArguments],
        on_policy_cells: Sequence[int],
        rows: Sequences,
        position: MicroBatchPosition,
        purpose: str,
    ) -> dict[int, Sequences]:
        """Let on-policy students complete the prompts of (S*B) rows; return cell number -> its (B) rows."""
        ...


class GenerateSampler:
    """Samples with transformers' `generate`, all on-policy cells of a pack at once.

    cast_dtype: Dtype to which autocast casts weights; None: no autocast.
    precision: Context of the model's arithmetic.
    """

    def __init__(
        self,
        pack: Pack,
        limits: GenerationLimits,
        cast_dtype: torch.dtype | None,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.pack, self.limits, self.cast_dtype, self.precision = pack, limits, cast_dtype, precision

    def sample(
        self,
        cells: Sequence[CellArguments],
        on_policy_cells: Sequence[int],
        rows: Sequences,
        position: MicroBatchPosition,
        purpose: str,
    ) -> dict[int, Sequences]:
        """Sample all on-policy cells at once, by noise of seed and step; return cell number -> (B) rows."""
        seeds = distinct_seeds(cells)
        prompts_of_seed = dict(zip(seeds, split_blocks(rows, len(seeds)), strict=True))
        prompts = [prompts_of_seed[cells[n].seed] for n in on_policy_cells]
        num_rows, limits = prompts[0].num_rows, self.limits
        noise_of_seed = {
            seed: position.slice_noise(
                draw_uniforms(
                    seed, position.step, purpose, position.count_step_rows(), limits.max_new_tokens
                ),
                num_rows,
            )
            for seed in {cells[n].seed for n in on_policy_cells}
        }
        temperatures = [cells[n].temperature for n in on_policy_cells]
        # Autocast begins outside of the model, so that a weight cast for one token serves all others.
        with self.precision(), self.pack.select_cells(on_policy_cells, self.cast_dtype) as model:
            completions = generate_completions(
                model,
                concatenate_blocks(prompts, limits.pad_id),
                max_new_tokens=limits.max_new_tokens,
                end_ids=limits.end_ids,
                pad_id=limits.pad_id,
                uniforms=torch.cat([noise_of_seed[cells[n].seed] for n in on_policy_cells]),
                temperature=_spread_temperatures(temperatures, num_rows),
                vocabulary_size=limits.vocabulary_size,
            )
        return dict(zip(on_policy_cells, split_blocks(completions, len(on_policy_cells)), strict=True))


def _spread_temperatures(temperatures: Sequence[float], rows_per_cell: int) -> float | Tensor:
    """Return the temperature of all cells, or (N, 1) of each row where cells differ."""
    if len(set(temperatures)) == 1:
        return temperatures[0]
    return torch.tensor(temperatures).repeat_interleave(rows_per_cell)[:, None]


class TeacherCompletions:
    """TRL's `seq_kd`: the teacher's sampled completion replaces the dataset's, sampled once per prompt.

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

    def replace_completions(self, rows: Sequences) -> Sequences:
        """Return the rows with the teacher's completions: sampled for new prompts, cached for others."""
        prompts = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(rows.prompt_ids, rows.prompt_mask, strict=True)
        ]
        new = [n for n, prompt in enumerate(prompts) if prompt not in self.completion_cache]
        if self.is_true_on_any_rank(bool(new)):
            # A sharded teacher needs all ranks at once, so a rank without a new prompt repeats an old one.
            new = new or [0]
            answers = self._sample_completions(
                rows.map_tensors(lambda tensor: tensor[new]), [prompts[n] for n in new]
            )
            for n, ids, mask in zip(new, answers.completion_ids, answers.completion_mask, strict=True):
                self.completion_cache[prompts[n]] = ids[mask.bool()].tolist()
        return _set_completions(
            rows, [self.completion_cache[prompt] for prompt in prompts], self.limits.pad_id
        )

    def _sample_completions(self, rows: Sequences, prompts: Sequence[tuple[int, ...]]) -> Sequences:
        """Let the teacher sample one completion per row, with noise keyed by seed and prompt, not step."""
        noise = [
            draw_uniforms(
                derive_seed(self.seed, _hash_prompt(prompt), "teacher"),
                0,
                "sampling",
                1,
                self.limits.max_new_tokens,
            )
            for prompt in prompts
        ]
        return generate_completions(
            self.teacher,
            rows,
            max_new_tokens=self.limits.max_new_tokens,
            end_ids=self.limits.end_ids,
            pad_id=self.limits.pad_id,
            uniforms=torch.cat(noise),
            temperature=self.temperature,
            vocabulary_size=self.limits.vocabulary_size,
        )


def _hash_prompt(ids: Sequence[int]) -> int:
    """Return a 64-bit integer hash of the token ids, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(ids).encode(), digest_size=8).digest(), "big")


def _set_completions(rows: Sequences, completions: Sequence[list[int]], pad_id: int) -> Sequences:
    """Return the rows with these lists of token ids as completions, padded on the right, with their mask."""
    width = max(1, *(len(completion) for completion in completions))
    ids = rows.prompt_ids.new_full((len(completions), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, completion in enumerate(completions):
        ids[row, : len(completion)] = ids.new_tensor(completion)
        mask[row, : len(completion)] = 1
    return rows.replace_completions(ids, mask)
