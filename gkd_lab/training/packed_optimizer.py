"""Optimizing a pack: one pair of parameter groups a cell, on views of the pack's weights, clipped apart.

Each cell's views have the shapes of a plain model, so an optimizer whose step depends on a tensor's shape
(Adafactor) does what it would do alone. Shapes: K cells.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.packing import Pack

CellParameters = list[dict[str, nn.Parameter]]


def create_parameter_views(pack: Pack) -> CellParameters:
    """For each cell name -> its weights, as parameters that share the pack's memory."""
    return [
        {name: nn.Parameter(view) for name, view in pack.get_cell_parameters(n).items()}
        for n in range(pack.size)
    ]


def reattach_parameter_views(cell_parameters: CellParameters, pack: Pack) -> None:
    """Views whose pack has been moved to another place share its memory again."""
    for n, own in enumerate(cell_parameters):
        for name, weight in pack.get_cell_parameters(n).items():
            own[name].data = weight


def build_parameter_groups(
    cell_parameters: CellParameters,
    cells: Sequence[CellArguments],
    decayed: Collection[str],
    weight_decay: float,
) -> list[dict[str, object]]:
    """Parameter groups for the optimizer: each cell's at its own rate, decayed weights apart."""
    found: list[dict[str, object]] = []
    for cell, own in zip(cells, cell_parameters, strict=True):
        for decays in (True, False):
            parameters = [view for name, view in own.items() if (name in decayed) == decays]
            if parameters:
                decay = weight_decay if decays else 0.0
                found.append({"params": parameters, "lr": cell.learning_rate, "weight_decay": decay})
    return found


def clip_cell_gradients(
    model: nn.Module,
    cell_parameters: CellParameters,
    max_norm: float | None,
    failed: Collection[int],
    on_failure: Callable[[int, str], None],
) -> Tensor:
    """Norm of each cell's gradient before clipping, (K,); hands the clipped ones to the optimizer."""
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    squares = torch.stack([g.flatten(1).square().sum(1) for _, g in named])
    norms = squares.sum(0).sqrt()
    for n in (~norms.isfinite()).nonzero().flatten().tolist():
        on_failure(n, f"the gradient's norm is {norms[n].item()}")
    if max_norm and max_norm > 0:
        scale = (max_norm / (norms + 1e-6)).clamp_max(1)
        for _, g in named:
            g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))
    for n, own in enumerate(cell_parameters):
        for name, gradient in named:
            own[name].grad = None if n in failed else gradient[n]
    return norms
