"""What a pack's optimizer updates: neighbouring cells of one learning rate at once, or every cell apart.

AdamW is elementwise, so that it takes cells stacked: 39 tensors for 15 cells instead of 585. Adafactor
depends on a tensor's shape and takes each cell in the shapes of a plain model.
Shapes: K cells, k of them in a block.
"""

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.packing import Pack

STACKABLE_OPTIMIZERS: tuple[type[torch.optim.Optimizer], ...] = (torch.optim.AdamW, torch.optim.Adam)
"""Optimizers whose step on an element depends on nothing but the element and the number of steps."""


@dataclass(frozen=True)
class ParameterBlock:
    """Weights of neighbouring cells that the optimizer updates as one.

    cells: Their numbers, k of them.
    parameters: By name, views of the pack's weights: (k, ...), or one cell's in the shape of a plain model.
    """

    cells: range
    parameters: dict[str, nn.Parameter]
    is_stacked: bool

    def select(self, tensor: Tensor) -> Tensor:
        """Return the block's view of a tensor of all cells, (K, ...)."""
        first = self.cells.start
        return tensor[first : self.cells.stop] if self.is_stacked else tensor[first]

    def renew_views(self, weights: Mapping[str, Tensor]) -> None:
        """Point the parameters to these weights of all cells, by name, (K, ...)."""
        for name, parameter in self.parameters.items():
            parameter.data = self.select(weights[name])

    def read_cell_state(self, cell: int, optimizer: Any) -> dict[str, Any]:
        """Return a cell's optimizer state as `ENTRY:NAME` -> a plain model's tensor, or a number."""
        entries: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            for entry, value in optimizer.state.get(parameter, {}).items():
                is_shared = not self.is_stacked or is_number(value)
                entries[f"{entry}:{name}"] = value if is_shared else value[cell - self.cells.start]
        return entries

    def write_state(self, entries_of_cells: Sequence[Mapping[str, Any]], optimizer: Any) -> None:
        """Set the optimizer's state to what `read_cell_state` returned for each of the block's cells."""
        inner = getattr(optimizer, "optimizer", optimizer)
        settings = {id(p): group for group in inner.param_groups for p in group["params"]}
        for key, value in entries_of_cells[0].items():
            entry, _, name = key.partition(":")
            parameter = self.parameters[name]
            if self.is_stacked and not is_number(value):
                value = torch.stack([entries[key] for entries in entries_of_cells])
            if isinstance(value, Tensor):
                group = settings[id(parameter)]
                # As torch's own loading: a step counter is on the device only for kernels that read it there.
                if not is_number(value) or group.get("fused") or group.get("capturable"):
                    value = value.to(parameter.device)
            inner.state[parameter][entry] = value


def is_number(value: Any) -> bool:
    """Return whether an entry of an optimizer's state is one number, such as a counter of steps."""
    return not isinstance(value, Tensor) or value.dim() == 0


def build_blocks(pack: Pack, keys: Sequence[Hashable], *, stacked: bool) -> list[ParameterBlock]:
    """Return blocks of the pack's trainable weights, whose parameters are new.

    stacked: Neighbours with equal `keys`, one key a cell, form a block. Otherwise every cell is one.
    """
    weights = pack.get_trainable_weights()
    # The state of a plain number could not be told from its step counter.
    stacked = stacked and all(weight.dim() > 1 for weight in weights.values())
    sizes = [len(list(group)) for _, group in itertools.groupby(keys)] if stacked else [1] * pack.size
    ends = list(itertools.accumulate(sizes))
    blocks = []
    for size, end in zip(sizes, ends, strict=True):
        block = ParameterBlock(range(end - size, end), {}, stacked)
        views = {name: nn.Parameter(block.select(weight)) for name, weight in weights.items()}
        block.parameters.update(views)
        blocks.append(block)
    return blocks


def build_parameter_groups(
    blocks: Sequence[ParameterBlock],
    cells: Sequence[CellArguments],
    decayed: Collection[str],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Build up to two optimizer groups per learning rate: decayed weights, and others without decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for block in blocks:
        rate = cells[block.cells.start].learning_rate
        for name, parameter in block.parameters.items():
            groups.setdefault((rate, name in decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if is_decayed else 0.0}
        for (rate, is_decayed), parameters in groups.items()
    ]


def hand_over_gradients(model: nn.Module, blocks: Sequence[ParameterBlock], failed: Collection[int]) -> None:
    """Give each block its part of the pack's gradient; None if it has none, or all of its cells failed."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for block in blocks:
        is_running = any(n not in failed for n in block.cells)
        for name, parameter in block.parameters.items():
            gradient = gradients[name] if is_running else None
            parameter.grad = None if gradient is None else block.select(gradient)


class FrozenCells:
    """Weights of failed cells, which a step on their block must not change."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self.weights: dict[int, list[Tensor]] = {}

    def freeze_cells(self, cells: Collection[int]) -> None:
        """Keep the present weights of those of the cells that are not frozen yet."""
        for n in cells:
            if n not in self.weights:
                self.weights[n] = [view.clone() for view in self.pack.get_cell_parameters(n).values()]

    def restore_weights(self) -> None:
        """Write the kept weights back into the pack."""
        for n, weights in self.weights.items():
            torch._foreach_copy_(list(self.pack.get_cell_parameters(n).values()), weights)
