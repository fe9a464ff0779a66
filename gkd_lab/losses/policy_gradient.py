"""Reward and distillation together (Eq. 5): a policy gradient on the text that a divergence reads too.

    max (1 - alpha) E[r(y)] - alpha E[D(p_T || p_S)(y|x)],  y ~ p_S

The gradient of E[r(y)] is E[A(y) grad log p_S(y|x)] for any baseline that does not depend on y (Williams
1992); A is the advantage, the reward less its baseline. Nothing is kept from step to step.

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
"""Prompts, what the student wrote, and what the data has in its place."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a step: how many, and the sum of a tensor over them."""

    size: int = 1
    sum_tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor


def compute_advantages(rewards: Tensor, baseline: str, normalize: bool, processes: ProcessGroup) -> Tensor:
    """The advantage of each row of this rank, (n,), from their rewards, (n,), float64.

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
    """Factor on the weights of the tokens in a cell's loss, (B, C), that makes the term REINFORCE's.

    REINFORCE takes the sum of a sequence's log-probabilities and averages over sequences: the -log q of each
    token weighs A_i / n. The loss weighs it w / items, with w = 1 / L_i where `loss_normalization` is
    "sequence" and w = 1 where it is "token". So the factor is A_i items / (n w), and the gradient is the same
    under both.
    """
    weights = token_weights(mask_BC, normalization)
    each = advantages_B.to(weights)[:, None] * items.to(weights) / sequences
    return torch.where(weights > 0, each / weights.where(weights > 0, 1.0), 0.0)


@dataclass(frozen=True)
class RewardHooks:
    """What a trainer does with what a step earned.

    fail: (cell, why) when a reward is no number. log: (cell, name of the term, mean reward, standard
    deviation of the advantages).
    """

    fail_cell: Callable[[int, str], None]
    log_reward: Callable[[int, str, float, float], None]


@dataclass(frozen=True)
class RewardTerm:
    """A reward among the terms of a cell's loss: which of them, what it is called, and what it is."""

    number: int
    name: str
    loss: RewardLoss


def _list_reward_terms(terms: WeightedLosses) -> list[RewardTerm]:
    named = enumerate(zip(term_names(terms), terms, strict=True))
    return [RewardTerm(n, name, t.loss) for n, (name, t) in named if isinstance(t.loss, RewardLoss)]


class RewardScaler:
    """The rewards of a trainer's cells; each function or model is found once. ValueError for one that is not.

    Args:
        tokenizer: Turns what was written into texts.
        normalization: The trainer's `loss_normalization`.
        device: Where a reward that is a model is put.
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
        self.tokenizer, self.normalization, self.hooks, self.processes = (
            tokenizer,
            normalization,
            hooks,
            processes,
        )
        seeds = distinct_seeds(cells)
        self.seed_of_cell = [seeds.index(cell.seed) for cell in cells]
        self.seed_count = len(seeds)
        self.reward_terms = [_list_reward_terms(cell.list_terms()) for cell in cells]
        rules = {one.loss.function_key for asked in self.reward_terms for one in asked}
        self.reward_functions = {rule: load_reward_function(*rule, device) for rule in rules}

    def add_reward_scales(
        self, batches: Sequence[MicroBatch], dataset_rows: Sequence[Sequences], items: Tensor | None
    ) -> list[MicroBatch]:
        """The micro-batches of a step with the factors that make their rewards a policy gradient.

        fixed: the data's own rows, (S*B) for each micro-batch; items: what losses are divided by, (K,).
        """
        scales: list[dict[tuple[int, int], Tensor]] = [dict(batch.scales) for batch in batches]
        for cell, asked in enumerate(self.reward_terms):
            if items is None or not asked or not batches[0].on_policy[cell]:
                continue
            parts = [split_blocks(batch.student, len(self.reward_terms))[cell] for batch in batches]
            texts = self._decode_texts(parts, dataset_rows, self.seed_of_cell[cell])
            try:
                for one in asked:
                    factors = self._compute_scales(cell, one, texts, parts, items[cell])
                    for into, factor in zip(scales, factors, strict=True):
                        into[cell, one.number] = factor
            except ValueError as error:
                self.hooks.fail_cell(cell, str(error))
        return [replace(batch, scales=found) for batch, found in zip(batches, scales, strict=True)]

    def remove_rewards(self, batch: MicroBatch) -> MicroBatch:
        """A batch whose loss counts no reward."""
        none = torch.zeros(
            batch.student.num_rows // len(self.reward_terms), batch.student.completion_mask.shape[1]
        )
        mine = [(cell, one.number) for cell, asked in enumerate(self.reward_terms) for one in asked]
        return replace(batch, scales={**batch.scales, **dict.fromkeys(mine, none)})

    def _compute_scales(
        self, cell: int, term: RewardTerm, texts: RewardTexts, parts: Sequence[Sequences], items: Tensor
    ) -> list[Tensor]:
        """Those of a cell's term, (B, C) for each micro-batch; what was earned is logged."""
        config = term.loss.config
        rewards = torch.tensor(self._compute_rewards(term.loss, texts), dtype=torch.float64)
        each = compute_advantages(rewards, config.baseline, config.normalize, self.processes)
        self.hooks.log_reward(cell, term.name, *_reward_statistics(rewards, each, self.processes))
        sequences = (
            float(_sum_over_processes(rewards.new_tensor(len(rewards)), self.processes)) / self.processes.size
        )
        return [
            reinforce_scales(some, part.completion_mask, items, sequences, self.normalization)
            for some, part in zip(each.split([part.num_rows for part in parts]), parts, strict=True)
        ]

    def _compute_rewards(self, loss: RewardLoss, texts: RewardTexts) -> list[float]:
        """What this rank's texts earn. Raises ValueError on all ranks where one has no number for a text."""
        wrong, values = None, list[float]()
        try:
            values = compute_rewards(loss.config.name, self.reward_functions[loss.function_key], *texts)
        except ValueError as error:
            wrong = error
        if _sum_over_processes(torch.tensor(float(wrong is not None)), self.processes) > 0:
            raise wrong or ValueError(
                f"reward {loss.config.name!r} failed in another process, which says why"
            )
        return values

    def _decode_texts(
        self, parts: Sequence[Sequences], dataset_rows: Sequence[Sequences], seed: int
    ) -> RewardTexts:
        """Prompts, what was written, and the data's completions, of a step's rows."""
        own = [split_blocks(rows, self.seed_count)[seed] for rows in dataset_rows]
        prompts = [text for part in own for text in self._decode_rows(part.prompt_ids, part.prompt_mask)]
        texts = [
            text for part in parts for text in self._decode_rows(part.completion_ids, part.completion_mask)
        ]
        wanted = [
            text for part in own for text in self._decode_rows(part.completion_ids, part.completion_mask)
        ]
        return prompts, texts, wanted

    def _decode_rows(self, ids: Tensor, mask: Tensor) -> list[str]:
        """As an evaluation reads what was written: no special tokens, nothing around it."""
        kept = [row[used.bool()].tolist() for row, used in zip(ids, mask, strict=True)]
        found: list[str] = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return [text.strip() for text in found]


def _sum_over_processes(tensor: Tensor, processes: ProcessGroup) -> Tensor:
    return tensor if processes.size == 1 else processes.sum_tensor(tensor).to(tensor)


def _reward_statistics(rewards: Tensor, advantages: Tensor, processes: ProcessGroup) -> tuple[float, float]:
    """Mean reward and the advantages' standard deviation, over all ranks."""
    sums = torch.stack(
        [torch.ones_like(rewards).sum(), rewards.sum(), advantages.sum(), advantages.square().sum()]
    )
    count, reward, first, second = _sum_over_processes(sums, processes).tolist()
    return reward / count, max(0.0, second / count - (first / count) ** 2) ** 0.5
