"""What each term of a loss asks of the student: the norm of its own gradient.

Shapes: K cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.step_loss import MicroBatch
from gkd_lab.losses.terms import term_names
from gkd_lab.models.packing import Pack


def term_gradient_norms(
    pack: Pack,
    cells: Sequence[CellArguments],
    compute_losses: Callable[[MicroBatch], Tensor],
    batch: MicroBatch,
) -> list[dict[str, float]]:
    """For each cell name of a term -> norm of its gradient by all of the cell's weights that train.

    losses: of a batch, (K,). The loss is a sum of its terms, so that gradients, not norms, add up.
    """
    called = [term_names(cell.list_terms()) for cell in cells]
    parameters = [p for p in pack.model.parameters() if p.requires_grad]
    found: list[dict[str, float]] = [{} for _ in cells]
    for place in range(max(map(len, called))):
        with torch.enable_grad():
            total = compute_losses(replace(batch, only_term=place)).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        norms = _cell_norms([g for g in gradients if g is not None], len(cells), packed=pack.is_packed)
        for n, own in enumerate(called):
            if place < len(own):
                found[n][own[place]] = float(norms[n])
    return found


def _cell_norms(gradients: Sequence[Tensor], cells: int, *, packed: bool) -> Tensor:
    """Over each cell's share of the gradients, (K,)."""
    if not gradients:
        return torch.zeros(cells)
    squares = [
        g.flatten(1).double().square().sum(1) if packed else g.double().square().sum() for g in gradients
    ]
    return torch.stack(squares).sum(0).sqrt().view(-1)
