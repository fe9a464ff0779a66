"""What is logged of each cell: means over the steps since the last row."""

import torch
from torch import Tensor

from gkd_lab.distill.steps import StepBatch


class Averages:
    """Means of what was logged since the last row, for each cell."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self._reset()

    def _reset(self) -> None:
        zeros = torch.zeros(self.cells, dtype=torch.float64)
        self.steps = 0
        self.sums = {
            name: zeros.clone() for name in ("loss", "grad_norm", "on_policy", "rows", "tokens", "truncated")
        }

    def add_losses(self, losses: Tensor, batch: StepBatch, end_ids: Tensor) -> None:
        ids, mask = batch.student.completion_ids, batch.student.completion_mask
        lengths = mask.sum(-1)
        last = ids.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
        cut = ~torch.isin(last, end_ids).view(self.cells, -1)
        on_policy = torch.tensor(batch.on_policy, dtype=torch.float64)
        self.sums["loss"] += losses.double().cpu()
        self.sums["on_policy"] += on_policy * cut.shape[1]
        self.sums["truncated"] += on_policy * cut.sum(-1).cpu()
        self.sums["rows"] += cut.shape[1]
        self.sums["tokens"] += lengths.view(self.cells, -1).sum(-1).cpu()

    def add_norms(self, norms: Tensor) -> None:
        self.steps += 1
        self.sums["grad_norm"] += norms.double().cpu()

    def take(self) -> list[dict[str, float]]:
        """One row a cell; starts anew."""
        sums, steps = self.sums, max(self.steps, 1)
        rows = [
            {
                "loss": float(sums["loss"][n]) / steps,
                "grad_norm": float(sums["grad_norm"][n]) / steps,
                "on_policy": float(sums["on_policy"][n] / sums["rows"][n].clamp_min(1)),
                "completion_length": float(sums["tokens"][n] / sums["rows"][n].clamp_min(1)),
                "truncated": float(sums["truncated"][n] / sums["on_policy"][n].clamp_min(1)),
            }
            for n in range(self.cells)
        ]
        self._reset()
        return rows
