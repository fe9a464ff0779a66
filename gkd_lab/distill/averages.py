"""What is logged of each cell: means over the steps since the last row."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gkd_lab.distill.steps import StepBatch

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
        self.most = max(map(len, self.names))
        self._reset()

    def _reset(self) -> None:
        self.batches = 0
        self.sums = {name: torch.zeros(self.cells, dtype=torch.float64) for name in SUMS}
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

    def add_norms(self, norms: Tensor) -> None:
        """The end of a step, with the norm of each cell's gradient, (K,)."""
        self.sums["steps"] += 1
        self.sums["grad_norm"] += norms.double().cpu()

    def take(self, over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[dict[str, float]]:
        """One row a cell, of all ranks; starts anew.

        loss: mean over steps (over micro-batches where no step ended); on_policy: share of rows that the
        student wrote; completion_length: tokens; truncated: share of written rows without an end;
        entropy: of the student's next token, nats; loss/NAME: what each of several terms adds.
        """
        found = over_ranks(torch.cat([torch.stack([self.sums[name] for name in SUMS]), self.terms]))
        sums, terms = dict(zip(SUMS, found, strict=False)), found[len(SUMS) :]
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
        return rows
