"""Per-cell training metrics: means over the steps since the last logged row."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gkd_lab.losses.label_losses import RewardLoss
from gkd_lab.losses.step_loss import MicroBatch

HOST_NAMES = ("on_policy", "rows", "steps", "batches")
"""Sums that are known without the device."""
DEVICE_NAMES = ("loss", "tokens", "entropy", "truncated", "grad_norm")
"""Sums that stay on the device until they are read: a step does not wait for them."""


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
        self._host_sums = {name: np.zeros(self.n_cells) for name in (*HOST_NAMES, *reward_sums)}
        self._device_sums = torch.zeros(len(DEVICE_NAMES) + self.max_terms, self.n_cells, dtype=torch.float64)

    def read_sums(self) -> Tensor:
        """Return all sums on the CPU, (n sums, K): those of `sum_names`, then those of the terms."""
        host_sums = torch.from_numpy(np.stack(list(self._host_sums.values())))
        return torch.cat([host_sums, self._device_sums.cpu()])

    @property
    def sum_names(self) -> list[str]:
        """Names of the first sums of `read_sums`, in order."""
        return [*self._host_sums, *DEVICE_NAMES]

    def set_cell_sums(self, cell: int, sums: Mapping[str, float], terms: Sequence[float]) -> None:
        """Overwrite a cell's sums by name, and its first terms' sums; names without a sum are left out."""
        for name, value in sums.items():
            if name in self._host_sums:
                self._host_sums[name][cell] = value
            elif name in DEVICE_NAMES:
                self._device_sums[DEVICE_NAMES.index(name), cell] = value
        for n, value in enumerate(terms[: self.max_terms]):
            self._device_sums[len(DEVICE_NAMES) + n, cell] = value

    def _add_on_device(self, first: int, values: Tensor) -> None:
        """Add values, (n, K), to the device's sums from number `first` on; the sums move to their device."""
        if self._device_sums.device != values.device:
            self._device_sums = self._device_sums.to(values.device)
        self._device_sums[first : first + len(values)].add_(values)

    def add_micro_batch(self, losses: Tensor, entropies: Tensor, batch: MicroBatch, end_ids: Tensor) -> None:
        """Add a micro-batch: losses (K,) are shares of the step's loss, entropies (K,) sums over tokens.

        Truncated are those on-policy rows whose last token is not among `end_ids`.
        """
        lengths = batch.student.completion_mask.sum(-1).view(self.n_cells, -1)
        on_policy, rows_per_cell = np.array(batch.on_policy, dtype=np.float64), lengths.shape[1]
        self.add_sums(on_policy=on_policy * rows_per_cell, rows=rows_per_cell)
        sums = [losses.double(), lengths.sum(-1, dtype=torch.float64), entropies.double()]
        if any(batch.on_policy):
            truncated = self._count_truncated(batch, lengths, end_ids).double()
            if not all(batch.on_policy):
                truncated *= torch.from_numpy(on_policy).to(truncated.device)
            sums.append(truncated)
        self._add_on_device(0, torch.stack(sums))

    def _count_truncated(self, batch: MicroBatch, lengths: Tensor, end_ids: Tensor) -> Tensor:
        """Return each cell's number of rows whose last token is not among `end_ids`, (K,)."""
        last = (lengths.flatten() - 1).clamp_min(0)[:, None]
        last_ids = batch.student.completion_ids.gather(1, last)[:, 0]
        return (~torch.isin(last_ids, end_ids.to(last_ids.device))).view(self.n_cells, -1).sum(-1)

    def add_sums(self, **values: Any) -> None:
        """Count a micro-batch and add its values, numbers or (K,), to the sums of these names."""
        self.n_batches += 1
        for name, value in {"batches": 1, **values}.items():
            if name in self._host_sums:
                self._host_sums[name] += value
            else:
                self._device_sums[DEVICE_NAMES.index(name)].add_(value)

    def add_term_losses(self, term_losses: Tensor) -> None:
        """Add a micro-batch's loss of each term of each cell, (K, most terms of a cell), to the term sums."""
        self._add_on_device(len(DEVICE_NAMES), term_losses.double().T)

    def add_reward(self, cell: int, name: str, reward: float, advantage_std: float) -> None:
        """Add one rewarded step of a cell: reward term `name`'s mean reward and its advantages' deviation."""
        for sum_name, value in zip(_build_reward_sum_names(name), (reward, advantage_std, 1.0), strict=True):
            self._host_sums[sum_name][cell] += value

    def add_grad_norms(self, norms: Tensor) -> None:
        """Add each cell's gradient norm, (K,), and count one more finished optimizer step."""
        self._host_sums["steps"] += 1
        self._add_on_device(DEVICE_NAMES.index("grad_norm"), norms.double()[None])

    def pop_means(
        self, reduce_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> list[dict[str, float]]:
        """Return a dict of means for each cell, over all ranks since the last call, and set the sums to 0.

        loss: mean over steps (over micro-batches where no step ended); on_policy: share of rows that the
        student sampled; completion_length: tokens; truncated: share of sampled rows without an end;
        entropy: of the student's next token, nats; loss/NAME: share of each of several terms; reward,
        advantage_std: means over the steps on which the cell was rewarded, if any.
        """
        all_sums, sum_names = reduce_over_ranks(self.read_sums()), self.sum_names
        sums, terms = dict(zip(sum_names, all_sums, strict=False)), all_sums[len(sum_names) :]
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
