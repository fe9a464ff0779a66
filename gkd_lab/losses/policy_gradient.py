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

from gkd_lab.losses.cell_arguments import CellArguments, shared_seeds
from gkd_lab.losses.reward_functions import rewards_of, rule_of
from gkd_lab.losses.step_loss import StepBatch, blocks, token_weights
from gkd_lab.losses.terms import PolicyGradient, Terms, names
from gkd_lab.models.forward import Sequences

Texts = tuple[list[str], list[str], list[str]]
"""Prompts, what the student wrote, and what the data has in its place."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share a step: how many, and the sum of a tensor over them."""

    world: int = 1
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor


def advantages(rewards: Tensor, baseline: str, normalize: bool, ranks: Ranks) -> Tensor:
    """The advantage of each row of this rank, (n,), from their rewards, (n,), float64.

    `leave_one_out`: r_i less the mean of the step's N - 1 other rows, which is N / (N - 1) (r_i - mean) and
    does not depend on y_i (Kool et al. 2019; Ahmadian et al. 2024, there over samples of one prompt); a row
    without others has the advantage 0. `none`: r_i itself. normalize: divided by the standard deviation of
    the step's N rewards; 0 where all are equal.
    """
    if baseline == "none":
        return rewards
    count, total = _total(torch.stack([torch.ones_like(rewards).sum(), rewards.sum()]), ranks)
    if count < 2:
        return torch.zeros_like(rewards)
    centred = rewards - total / count
    if normalize:
        std = (_total(centred.square().sum(), ranks) / count).sqrt()
        # Equal rewards may differ from their mean by rounding.
        centred = torch.where(std > 1e-9, centred / std.clamp_min(1e-9), 0.0)
    return centred * count / (count - 1)


def scale_of(
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
class Hooks:
    """What a trainer does with what a step earned.

    fail: (cell, why) when a reward is no number. log: (cell, name of the term, mean reward, standard
    deviation of the advantages).
    """

    fail: Callable[[int, str], None]
    log: Callable[[int, str, float, float], None]


@dataclass(frozen=True)
class Asked:
    """A reward among the terms of a cell's loss: which of them, what it is called, and what it is."""

    number: int
    name: str
    measure: PolicyGradient


def _asked(terms: Terms) -> list[Asked]:
    named = enumerate(zip(names(terms), terms, strict=True))
    return [Asked(n, name, t.measure) for n, (name, t) in named if isinstance(t.measure, PolicyGradient)]


class Rewards:
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
        hooks: Hooks,
        ranks: Ranks = Ranks(),
    ) -> None:
        self.tokenizer, self.normalization, self.hooks, self.ranks = tokenizer, normalization, hooks, ranks
        seeds = shared_seeds(cells)
        self.seed_of_cell = [seeds.index(cell.seed) for cell in cells]
        self.seeds = len(seeds)
        self.asked = [_asked(cell.terms()) for cell in cells]
        rules = {one.measure.rule for asked in self.asked for one in asked}
        self.rules = {rule: rule_of(*rule, device) for rule in rules}

    def scaled(
        self, batches: Sequence[StepBatch], fixed: Sequence[Sequences], items: Tensor | None
    ) -> list[StepBatch]:
        """The micro-batches of a step with the factors that make their rewards a policy gradient.

        fixed: the data's own rows, (S*B) for each micro-batch; items: what losses are divided by, (K,).
        """
        scales: list[dict[tuple[int, int], Tensor]] = [dict(batch.scales) for batch in batches]
        for cell, asked in enumerate(self.asked):
            if items is None or not asked or not batches[0].on_policy[cell]:
                continue
            parts = [blocks(batch.student, len(self.asked))[cell] for batch in batches]
            texts = self._texts(parts, fixed, self.seed_of_cell[cell])
            try:
                for one in asked:
                    factors = self._factors(cell, one, texts, parts, items[cell])
                    for into, factor in zip(scales, factors, strict=True):
                        into[cell, one.number] = factor
            except ValueError as error:
                self.hooks.fail(cell, str(error))
        return [replace(batch, scales=found) for batch, found in zip(batches, scales, strict=True)]

    def left_out(self, batch: StepBatch) -> StepBatch:
        """A batch whose loss counts no reward."""
        none = torch.zeros(batch.student.rows // len(self.asked), batch.student.completion_mask.shape[1])
        mine = [(cell, one.number) for cell, asked in enumerate(self.asked) for one in asked]
        return replace(batch, scales={**batch.scales, **dict.fromkeys(mine, none)})

    def _factors(
        self, cell: int, one: Asked, texts: Texts, parts: Sequence[Sequences], items: Tensor
    ) -> list[Tensor]:
        """Those of a cell's term, (B, C) for each micro-batch; what was earned is logged."""
        measure = one.measure
        rewards = torch.tensor(self._values(measure, texts), dtype=torch.float64)
        each = advantages(rewards, measure.baseline, measure.normalize, self.ranks)
        self.hooks.log(cell, one.name, *_earned(rewards, each, self.ranks))
        sequences = float(_total(rewards.new_tensor(len(rewards)), self.ranks)) / self.ranks.world
        return [
            scale_of(some, part.completion_mask, items, sequences, self.normalization)
            for some, part in zip(each.split([part.rows for part in parts]), parts, strict=True)
        ]

    def _values(self, measure: PolicyGradient, texts: Texts) -> list[float]:
        """What this rank's texts earn. Raises ValueError on all ranks where one has no number for a text."""
        wrong, values = None, list[float]()
        try:
            values = rewards_of(measure.name, self.rules[measure.rule], *texts)
        except ValueError as error:
            wrong = error
        if _total(torch.tensor(float(wrong is not None)), self.ranks) > 0:
            raise wrong or ValueError(f"reward {measure.name!r} failed in another process, which says why")
        return values

    def _texts(self, parts: Sequence[Sequences], fixed: Sequence[Sequences], seed: int) -> Texts:
        """Prompts, what was written, and the data's completions, of a step's rows."""
        own = [blocks(rows, self.seeds)[seed] for rows in fixed]
        prompts = [text for part in own for text in self._decoded(part.prompt_ids, part.prompt_mask)]
        texts = [text for part in parts for text in self._decoded(part.completion_ids, part.completion_mask)]
        wanted = [text for part in own for text in self._decoded(part.completion_ids, part.completion_mask)]
        return prompts, texts, wanted

    def _decoded(self, ids: Tensor, mask: Tensor) -> list[str]:
        """As an evaluation reads what was written: no special tokens, nothing around it."""
        kept = [row[used.bool()].tolist() for row, used in zip(ids, mask, strict=True)]
        found: list[str] = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return [text.strip() for text in found]


def _total(tensor: Tensor, ranks: Ranks) -> Tensor:
    return tensor if ranks.world == 1 else ranks.total(tensor).to(tensor)


def _earned(rewards: Tensor, each: Tensor, ranks: Ranks) -> tuple[float, float]:
    """Mean reward and the advantages' standard deviation, over all ranks."""
    sums = torch.stack([torch.ones_like(rewards).sum(), rewards.sum(), each.sum(), each.square().sum()])
    count, reward, first, second = _total(sums, ranks).tolist()
    return reward / count, max(0.0, second / count - (first / count) ** 2) ** 0.5
