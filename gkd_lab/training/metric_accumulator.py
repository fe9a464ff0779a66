"""What is logged of each cell: means over the steps since the last row."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gkd_lab.losses.step_loss import StepBatch
from gkd_lab.losses.terms import PolicyGradient

SUMS = ("loss", "grad_norm", "on_policy", "rows", "tokens", "truncated", "entropy", "steps", "batches")


class Averages:
    """Sums over micro-batches and steps for each cell, handed out as means.

    Args:
        cells: K.
        terms: For each cell the names of its loss's terms; a cell with several has a mean of each.
    """

    def __init__(self, cells: int, terms: Sequence[Sequence[str]] = ()) -> None:
        self.cells = cells
        self.names = terms or [()] * cells
        self.rewards = sorted({name for own in self.names for name in own if _is_reward(name)})
        self.most = max(map(len, self.names))
        self._reset()

    def _reset(self) -> None:
        self.batches = 0
        of_rewards = [sum_name for name in self.rewards for sum_name in _sums_of(name)]
        self.sums = {name: torch.zeros(self.cells, dtype=torch.float64) for name in (*SUMS, *of_rewards)}
        self.terms = torch.zeros(self.most, self.cells, dtype=torch.float64)

    def add(self, losses: Tensor, entropies: Tensor, batch: StepBatch, end_ids: Tensor) -> None:
        """A micro-batch; losses (K,) are shares of the step's loss, entropies (K,) sums over tokens."""
        ids, mask = batch.student.completion_ids, batch.student.completion_mask
        lengths = mask.sum(-1)
        last = ids.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
        cut = ~torch.isin(last, end_ids.to(last.device)).view(self.cells, -1)
        on_policy = torch.tensor(batch.on_policy, dtype=torch.float64)
        self.batches += 1
        self.sums["batches"] += 1
        self.sums["loss"] += losses.double().cpu()
        self.sums["entropy"] += entropies.double().cpu()
        self.sums["on_policy"] += on_policy * cut.shape[1]
        self.sums["truncated"] += on_policy * cut.sum(-1).cpu()
        self.sums["rows"] += cut.shape[1]
        self.sums["tokens"] += lengths.view(self.cells, -1).sum(-1).cpu()

    def add_terms(self, terms: Tensor) -> None:
        """What each term adds to the loss of a micro-batch, (K, most terms of a cell)."""
        self.terms[: terms.shape[1]] += terms.double().cpu().T

    def add_reward(self, cell: int, name: str, reward: float, advantage_std: float) -> None:
        """What a cell's step earned from the term `name`: a mean reward, and how far advantages lie apart."""
        for sum_name, value in zip(_sums_of(name), (reward, advantage_std, 1.0), strict=True):
            self.sums[sum_name][cell] += value

    def add_norms(self, norms: Tensor) -> None:
        """The end of a step, with the norm of each cell's gradient, (K,)."""
        self.sums["steps"] += 1
        self.sums["grad_norm"] += norms.double().cpu()

    def take(self, over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[dict[str, float]]:
        """One row a cell, of all ranks; starts anew.

        loss: mean over steps (over micro-batches where no step ended); on_policy: share of rows that the
        student wrote; completion_length: tokens; truncated: share of written rows without an end;
        entropy: of the student's next token, nats; loss/NAME: what each of several terms adds; reward,
        advantage_std: means over the steps on which the cell was rewarded, if any.
        """
        found = over_ranks(torch.cat([torch.stack(list(self.sums.values())), self.terms]))
        sums, terms = dict(zip(self.sums, found, strict=False)), found[len(self.sums) :]
        self._reset()
        steps = torch.where(sums["steps"] > 0, sums["steps"], sums["batches"]).clamp_min(1)
        means = {
            "loss": sums["loss"] / steps,
            "grad_norm": sums["grad_norm"] / steps,
            "on_policy": sums["on_policy"] / sums["rows"].clamp_min(1),
            "completion_length": sums["tokens"] / sums["rows"].clamp_min(1),
            # Over ranks these are means of counts, so a share may have a denominator below 1.
            "truncated": sums["truncated"] / sums["on_policy"].clamp_min(1e-9),
            "entropy": sums["entropy"] / sums["tokens"].clamp_min(1e-9),
        }
        rows = [{name: float(values[n]) for name, values in means.items()} for n in range(self.cells)]
        for n, (row, names) in enumerate(zip(rows, self.names, strict=True)):
            if len(names) > 1:
                row |= {f"loss/{name}": float(terms[k, n] / steps[n]) for k, name in enumerate(names)}
            for name in filter(_is_reward, names):
                shown = _sums_of(name)[:2]
                if count := float(sums[_sums_of(name)[2]][n]):
                    row |= {one: float(sums[one][n]) / count for one in shown}
        return rows


def _is_reward(name: str) -> bool:
    """Whether a term of this name is a reward: `reward`, `reward_2`, ..."""
    return name.startswith(PolicyGradient.kind)


def _sums_of(name: str) -> tuple[str, str, str]:
    """Of `reward_2`: itself, `advantage_std_2`, and how many steps were rewarded."""
    number = name.removeprefix(PolicyGradient.kind)
    return name, f"advantage_std{number}", f"rewarded_steps{number}"
