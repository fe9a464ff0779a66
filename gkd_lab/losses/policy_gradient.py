"""REINFORCE for rewards beside distillation (Eq. 5): advantages and their scales on the loss's tokens.

    max (1 - alpha) E[r(y)] - alpha E[D(p_T || p_S)(y|x)],  y ~ p_S

The gradient of E[r(y)] is E[A(y) grad log p_S(y|x)] for any baseline that does not depend on y (Williams
1992); A is the advantage, the reward less its baseline. No state is carried from step to step.

Shapes: K cells, S seeds, B rows of a micro-batch, n rows of a step, C completion tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gkd_lab.losses.cell_arguments import CellArguments, distinct_seeds
from gkd_lab.losses.label_losses import RewardLoss
from gkd_lab.losses.reward_functions import compute_rewards, load_reward_function
from gkd_lab.losses.step_loss import MicroBatch, split_blocks, token_weights
from gkd_lab.losses.terms import WeightedLosses, term_names
from gkd_lab.models.forward import Sequences

RewardTexts = tuple[list[str], list[str], list[str]]
"""Prompts, the student's completions, and the dataset's completions (references)."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a step: their number, and a function that sums a tensor over them."""

    size: int = 1
    sum_tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor


def compute_advantages(rewards: Tensor, baseline: str, normalize: bool, processes: ProcessGroup) -> Tensor:
    """Return this rank's advantages, (n,): rewards less the mean of all ranks' other rows, or unchanged.

    rewards: (n,), float64.
    `leave_one_out`: r_i less the mean of the step's N - 1 other rows, which is N / (N - 1) (r_i - mean) and
    does not depend on y_i (Kool et al. 2019; Ahmadian et al. 2024, there over samples of one prompt); a row
    without others has the advantage 0. `none`: r_i itself. normalize: divided by the standard deviation of
    the step's N rewards; 0 where all are equal.
    """
    if baseline == "none":
        return rewards
    count, total = _sum_over_processes(
        torch.stack([torch.ones_like(rewards).sum(), rewards.sum()]), processes
    )
    if count < 2:
        return torch.zeros_like(rewards)
    centred = rewards - total / count
    if normalize:
        std = (_sum_over_processes(centred.square().sum(), processes) / count).sqrt()
        # Equal rewards may differ from their mean by rounding.
        centred = torch.where(std > 1e-9, centred / std.clamp_min(1e-9), 0.0)
    return centred * count / (count - 1)


def reinforce_scales(
    advantages_B: Tensor, mask_BC: Tensor, items: Tensor, sequences: float, normalization: str
) -> Tensor:
    """Return factors on token weights w, (B, C): A_i items / (sequences w), for REINFORCE's gradient.

    REINFORCE takes the sum of a sequence's log-probabilities and averages over sequences: the -log q of each
    token weighs A_i / n. The loss weighs it w / items, with w = 1 / L_i where `loss_normalization` is
    "sequence" and w = 1 where it is "token". So the factor is A_i items / (n w), and the gradient is the same
    under both.
    """
    weights = token_weights(mask_BC, normalization)
    token_scales = advantages_B.to(weights)[:, None] * items.to(weights) / sequences
    return torch.where(weights > 0, token_scales / weights.where(weights > 0, 1.0), 0.0)


@dataclass(frozen=True)
class RewardHooks:
    """The trainer's callbacks for the rewards of a step.

    fail_cell: (cell, reason), when a reward is no number. log_reward: (cell, name of the term, mean reward,
    standard deviation of the advantages).
    """

    fail_cell: Callable[[int, str], None]
    log_reward: Callable[[int, str, float, float], None]


@dataclass(frozen=True)
class RewardTerm:
    """A reward among the terms of a cell's loss: number of the term, its name in the log, its loss."""

    number: int
    name: str
    loss: RewardLoss


def _list_reward_terms(terms: WeightedLosses) -> list[RewardTerm]:
    """Return the reward terms of one cell, each with its number in the list and its log name."""
    named_terms = enumerate(zip(term_names(terms), terms, strict=True))
    return [
        RewardTerm(number, name, term.loss)
        for number, (name, term) in named_terms
        if isinstance(term.loss, RewardLoss)
    ]


class RewardScaler:
    """Computes the rewards of all cells and scales their loss by them; each function or model is loaded once.

    Args:
        tokenizer: Decodes completions.
        normalization: The trainer's `loss_normalization`.
        device: Of a reward that is a model.

    Raises:
        ConfigError: for a reward that cannot be found.
    """

    def __init__(
        self,
        cells: Sequence[CellArguments],
        tokenizer: Any,
        normalization: str,
        device: torch.device,
        hooks: RewardHooks,
        processes: ProcessGroup = ProcessGroup(),
    ) -> None:
        self.tokenizer, self.normalization = tokenizer, normalization
        self.hooks, self.processes = hooks, processes
        seeds = distinct_seeds(cells)
        self.seed_of_cell = [seeds.index(cell.seed) for cell in cells]
        self.seed_count = len(seeds)
        self.reward_terms = [_list_reward_terms(cell.list_terms()) for cell in cells]
        keys = {term.loss.function_key for terms in self.reward_terms for term in terms}
        self.reward_functions = {key: load_reward_function(*key, device) for key in keys}

    def add_reward_scales(
        self, batches: Sequence[MicroBatch], dataset_rows: Sequence[Sequences], items: Tensor | None
    ) -> list[MicroBatch]:
        """Return copies of a step's micro-batches with the scales of all on-policy cells' reward terms set.

        dataset_rows: (S*B) rows for each micro-batch. items: the divisors of the losses, (K,); None: no
        scales are set. A reward that fails is reported to `hooks.fail_cell` and not raised.
        """
        scales: list[dict[tuple[int, int], Tensor]] = [dict(batch.scales) for batch in batches]
        for cell, terms in enumerate(self.reward_terms):
            if items is None or not terms or not batches[0].on_policy[cell]:
                continue
            parts = [split_blocks(batch.student, len(self.reward_terms))[cell] for batch in batches]
            texts = self._decode_texts(parts, dataset_rows, self.seed_of_cell[cell])
            try:
                for term in terms:
                    term_scales = self._compute_scales(cell, term, texts, parts, items[cell])
                    for batch_scales, scale in zip(scales, term_scales, strict=True):
                        batch_scales[cell, term.number] = scale
            except ValueError as error:
                self.hooks.fail_cell(cell, str(error))
        return [replace(batch, scales=new) for batch, new in zip(batches, scales, strict=True)]

    def zero_reward_scales(self, batch: MicroBatch) -> MicroBatch:
        """Return a copy of the batch in which every reward term has scales of 0, so that it adds no loss."""
        rows = batch.student.num_rows // len(self.reward_terms)
        zeros = torch.zeros(rows, batch.student.completion_mask.shape[1])
        keys = [(cell, term.number) for cell, terms in enumerate(self.reward_terms) for term in terms]
        return replace(batch, scales={**batch.scales, **dict.fromkeys(keys, zeros)})

    def _compute_scales(
        self, cell: int, term: RewardTerm, texts: RewardTexts, parts: Sequence[Sequences], items: Tensor
    ) -> list[Tensor]:
        """Return a reward term's scales, (B, C) for each micro-batch, and log its rewards' statistics."""
        config = term.loss.config
        rewards = torch.tensor(self._compute_rewards(term.loss, texts), dtype=torch.float64)
        advantages = compute_advantages(rewards, config.baseline, config.normalize, self.processes)
        self.hooks.log_reward(cell, term.name, *_reward_statistics(rewards, advantages, self.processes))
        total = _sum_over_processes(rewards.new_tensor(len(rewards)), self.processes)
        sequences = float(total) / self.processes.size
        rows = [part.num_rows for part in parts]
        return [
            reinforce_scales(part_advantages, part.completion_mask, items, sequences, self.normalization)
            for part_advantages, part in zip(advantages.split(rows), parts, strict=True)
        ]

    def _compute_rewards(self, loss: RewardLoss, texts: RewardTexts) -> list[float]:
        """Return this rank's rewards, one per text; if any rank's function fails, raise ValueError on all."""
        failure, rewards = None, list[float]()
        try:
            rewards = compute_rewards(loss.config.name, self.reward_functions[loss.function_key], *texts)
        except ValueError as error:
            failure = error
        if _sum_over_processes(torch.tensor(float(failure is not None)), self.processes) > 0:
            raise failure or ValueError(
                f"reward {loss.config.name!r} failed in another process, which says why"
            )
        return rewards

    def _decode_texts(
        self, parts: Sequence[Sequences], dataset_rows: Sequence[Sequences], seed: int
    ) -> RewardTexts:
        """Return (prompts, student's completions, references) of a cell's rows in a step, aligned."""
        dataset_parts = [split_blocks(rows, self.seed_count)[seed] for rows in dataset_rows]
        prompts, texts, references = list[str](), list[str](), list[str]()
        for part in dataset_parts:
            prompts += self._decode_rows(part.prompt_ids, part.prompt_mask)
            references += self._decode_rows(part.completion_ids, part.completion_mask)
        for part in parts:
            texts += self._decode_rows(part.completion_ids, part.completion_mask)
        return prompts, texts, references

    def _decode_rows(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Return each row's text, decoded without padding, special tokens and surrounding space."""
        unpadded = [row[used.bool()].tolist() for row, used in zip(ids, mask, strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(unpadded, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _sum_over_processes(tensor: Tensor, processes: ProcessGroup) -> Tensor:
    """Return the tensor summed over all processes, with its dtype and device."""
    return tensor if processes.size == 1 else processes.sum_tensor(tensor).to(tensor)


def _reward_statistics(rewards: Tensor, advantages: Tensor, processes: ProcessGroup) -> tuple[float, float]:
    """Return (mean reward, standard deviation of the advantages) over the rows of all ranks."""
    sums = torch.stack(
        [torch.ones_like(rewards).sum(), rewards.sum(), advantages.sum(), advantages.square().sum()]
    )
    count, reward, first, second = _sum_over_processes(sums, processes).tolist()
    return reward / count, max(0.0, second / count - (first / count) ** 2) ** 0.5
