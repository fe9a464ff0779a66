"""Per-cell training metrics: means over the steps since the last logged row."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gkd_lab.losses.label_losses import RewardLoss
from gkd_lab.losses.step_loss import MicroBatch

SUM_NAMES = ("loss", "grad_norm", "on_policy", "rows", "tokens", "truncated", "entropy", "steps", "batches")


class MetricAccumulator:
    """Sums metrics over micro-batches and steps for each cell, and returns them as means.

    Args:
        n_cells: K.
        term_names: For each cell the names of its loss's terms; a cell with several has a mean of each.
    """

    def __init__(self, n_cells: int, term_names: Sequence[Sequence[str]] = ()) -> None:
        self.n_cells = n_cells
        self.term_names = term_names or [()] * n_cells
        self.reward_names = sorted(
            {name for cell_names in self.term_names for name in cell_names if _is_reward_term(name)}
        )
        self.max_terms = max(map(len, self.term_names))
        self._reset()

    def _reset(self) -> None:
        """Set all sums and the batch count to 0."""
        self.n_batches = 0
        reward_sums = [sum_name for name in self.reward_names for sum_name in _build_reward_sum_names(name)]
        self.sums = {
            name: torch.zeros(self.n_cells, dtype=torch.float64) for name in (*SUM_NAMES, *reward_sums)
        }
        self.term_sums = torch.zeros(self.max_terms, self.n_cells, dtype=torch.float64)

    def add_micro_batch(self, losses: Tensor, entropies: Tensor, batch: MicroBatch, end_ids: Tensor) -> None:
        """Add a micro-batch: losses (K,) are shares of the step's loss, entropies (K,) sums over tokens.

        Truncated are those on-policy rows whose last token is not among `end_ids`.
        """
        ids, mask = batch.student.completion_ids, batch.student.completion_mask
        lengths = mask.sum(-1)
        last_ids = ids.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
        is_truncated = ~torch.isin(last_ids, end_ids.to(last_ids.device)).view(self.n_cells, -1)
        rows_per_cell = is_truncated.shape[1]
        on_policy = torch.tensor(batch.on_policy, dtype=torch.float64)
        self.add_sums(
            loss=losses.double().cpu(),
            entropy=entropies.double().cpu(),
            on_policy=on_policy * rows_per_cell,
            truncated=on_policy * is_truncated.sum(-1).cpu(),
            rows=rows_per_cell,
            tokens=lengths.view(self.n_cells, -1).sum(-1).cpu(),
        )

    def add_sums(self, **values: Tensor | float) -> None:
        """Count a micro-batch and add its values, numbers or (K,), to the sums of these names."""
        self.n_batches += 1
        for name, value in {"batches": 1, **values}.items():
            self.sums[name] += value

    def add_term_losses(self, term_losses: Tensor) -> None:
        """Add a micro-batch's loss of each term of each cell, (K, most terms of a cell), to the term sums."""
        self.term_sums[: term_losses.shape[1]] += term_losses.double().cpu().T

    def add_reward(self, cell: int, name: str, reward: float, advantage_std: float) -> None:
        """Add one rewarded step of a cell: reward term `name`'s mean reward and its advantages' deviation."""
        for sum_name, value in zip(_build_reward_sum_names(name), (reward, advantage_std, 1.0), strict=True):
            self.sums[sum_name][cell] += value

    def add_grad_norms(self, norms: Tensor) -> None:
        """Add each cell's gradient norm, (K,), and count one more finished optimizer step."""
        self.sums["steps"] += 1
        self.sums["grad_norm"] += norms.double().cpu()

    def pop_means(
        self, reduce_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> list[dict[str, float]]:
        """Return a dict of means for each cell, over all ranks since the last call, and set the sums to 0.

        loss: mean over steps (over micro-batches where no step ended); on_policy: share of rows that the
        student sampled; completion_length: tokens; truncated: share of sampled rows without an end;
        entropy: of the student's next token, nats; loss/NAME: share of each of several terms; reward,
        advantage_std: means over the steps on which the cell was rewarded, if any.
        """
        all_sums = reduce_over_ranks(torch.cat([torch.stack(list(self.sums.values())), self.term_sums]))
        sums, terms = dict(zip(self.sums, all_sums, strict=False)), all_sums[len(self.sums) :]
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
        rows = [{name: float(values[n]) for name, values in means.items()} for n in range(self.n_cells)]
        for n, (row, names) in enumerate(zip(rows, self.term_names, strict=True)):
            if len(names) > 1:
                row |= {f"loss/{name}": float(terms[k, n] / steps[n]) for k, name in enumerate(names)}
            for name in filter(_is_reward_term, names):
                *mean_names, count_name = _build_reward_sum_names(name)
                if count := float(sums[count_name][n]):
                    row |= {mean_name: float(sums[mean_name][n]) / count for mean_name in mean_names}
        return rows


def _is_reward_term(name: str) -> bool:
    """Whether a loss term's log name is a reward's: begins with `reward`, as `reward_2` does."""
    return name.startswith(RewardLoss.log_name)


def _build_reward_sum_names(name: str) -> tuple[str, str, str]:
    """Return the names of a reward term's three sums: `reward_2`, `advantage_std_2`, `rewarded_steps_2`."""
    suffix = name.removeprefix(RewardLoss.log_name)
    return name, f"advantage_std{suffix}", f"rewarded_steps{suffix}"
