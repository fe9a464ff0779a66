"""Gradient norm of each term of the loss.

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
from gkd_lab.models.rng import preserve_random_state


def term_gradient_norms(
    pack: Pack,
    cells: Sequence[CellArguments],
    compute_losses: Callable[[MicroBatch], Tensor],
    batch: MicroBatch,
) -> list[dict[str, float]]:
    """Return for each cell: term name -> L2 norm of the weighted term's gradient by the cell's weights.

    compute_losses: returns the losses of a batch, (K,). The terms' gradients, not their norms, add up: each
    term begins with the random state of the call, so with one dropout, and leaves it as it was.
    """
    names = [term_names(cell.list_terms()) for cell in cells]
    parameters = [p for p in pack.model.parameters() if p.requires_grad]
    cell_norms: list[dict[str, float]] = [{} for _ in cells]
    for number in range(max(map(len, names))):
        with torch.enable_grad(), preserve_random_state(pack.model.device):
            total = compute_losses(replace(batch, only_term=number)).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        norms = _cell_norms([g for g in gradients if g is not None], len(cells), packed=pack.is_packed)
        for n, names_of_cell in enumerate(names):
            if number < len(names_of_cell):
                cell_norms[n][names_of_cell[number]] = float(norms[n])
    return cell_norms


def _cell_norms(gradients: Sequence[Tensor], cells: int, *, packed: bool) -> Tensor:
    """Return the L2 norm of each cell's part of all gradients, (K,); `packed`: the first axis is the cell."""
    if not gradients:
        return torch.zeros(cells)
    squares = [
        g.flatten(1).double().square().sum(1) if packed else g.double().square().sum() for g in gradients
    ]
    return torch.stack(squares).sum(0).sqrt().view(-1)
