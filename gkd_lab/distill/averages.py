"""What is logged of each cell: means over the steps since the last row."""

from collections.abc import Callable

import torch
from torch import Tensor

from gkd_lab.distill.steps import StepBatch

SUMS = ("loss", "grad_norm", "on_policy", "rows", "tokens", "truncated", "entropy", "steps", "batches")


class Averages:
    """Sums over micro-batches and steps for each cell, handed out as means."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self._reset()

    def _reset(self) -> None:
        self.batches = 0
        self.sums = {name: torch.zeros(self.cells, dtype=torch.float64) for name in SUMS}

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

    def add_norms(self, norms: Tensor) -> None:
        """The end of a step, with the norm of each cell's gradient, (K,)."""
        self.sums["steps"] += 1
        self.sums["grad_norm"] += norms.double().cpu()

    def take(self, over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[dict[str, float]]:
        """One row a cell, of all ranks; starts anew.

        loss: mean over steps (over micro-batches where no step ended); on_policy: share of rows that the
        student wrote; completion_length: tokens; truncated: share of written rows without an end;
        entropy: of the student's next token, nats.
        """
        sums = dict(zip(SUMS, over_ranks(torch.stack([self.sums[name] for name in SUMS])), strict=True))
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
        return [{name: float(values[n]) for name, values in means.items()} for n in range(self.cells)]
