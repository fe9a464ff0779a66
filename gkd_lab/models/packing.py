"""K students of one architecture as one model: every weight gains a leading cell axis.

The batch dimension carries the cell: row `k * B + b` belongs to cell k, so attention, caches, masks and
`generate` of the model's own code work unchanged; only the modules that hold weights are replaced
(cf. HFTA, MLSys 2021). Shapes: K cells, B rows a cell.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_lab.models.pack_check import (
    CannotPack,
    check_forward_and_generation,
    check_member_logits,
    make_perturbed_copy,
)
from gkd_lab.models.packed_layers import (
    CellSelection,
    PackedLinear,
    PackedModule,
    pack_modules,
    patch_relative_bias,
)

__all__ = ["CannotPack", "Pack", "PackedLinear"]


class Pack:
    """K models trained and sampled as one. `model` is a PreTrainedModel whose batch carries the cells."""

    def __init__(self, model: PreTrainedModel, size: int, template: PreTrainedModel) -> None:
        self.model = model
        self.size = size
        self._template = template

    @classmethod
    def build_single(cls, model: PreTrainedModel) -> "Pack":
        """A pack of one: the model itself, of any architecture."""
        return cls(model, 1, model)

    @classmethod
    def build(cls, members: Sequence[PreTrainedModel]) -> "Pack":
        """Stack the weights of `members`, which are not changed.

        Two changed copies of the first member, and then the members, are computed packed and alone.

        Raises:
            CannotPack: if the members differ in kind, or a pack of them in its numbers; the message says why.
        """
        _check_same_architecture(members)
        copies = [make_perturbed_copy(members[0], seed) for seed in range(2)]
        check_forward_and_generation(_stack_models(copies), copies)
        del copies
        model = _stack_models(members)
        check_member_logits(model, members)
        return cls(model, len(members), copy.deepcopy(members[0]))

    @property
    def is_packed(self) -> bool:
        """Whether the weights have a cell axis; a pack `alone` has none."""
        return self._template is not self.model

    def get_cell_parameters(self, cell: int) -> dict[str, Tensor]:
        """Name -> the cell's share of each trainable parameter: a view, without gradient history."""
        named = self.model.named_parameters()
        if not self.is_packed:
            return {name: p.detach() for name, p in named if p.requires_grad}
        return {name: p.detach()[cell] for name, p in named if p.requires_grad}

    def get_cell_gradients(self, cell: int) -> dict[str, Tensor | None]:
        """Name -> the cell's share of each parameter's gradient: a view."""
        found: dict[str, Tensor | None] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                found[name] = p.grad if p.grad is None or not self.is_packed else p.grad[cell]
        return found

    def unpack_cell(self, cell: int) -> PreTrainedModel:
        """The cell's model, a plain one. It is reused by the next call: save it or copy it."""
        if self.is_packed:
            state = {
                name: value[cell] if _is_packed_parameter(self.model, name) else value
                for name, value in self.model.state_dict().items()
            }
            self._template.load_state_dict(state)
        return self._template

    def load_cell(self, cell: int, state: dict[str, Tensor]) -> None:
        """Put a plain model's weights into the cell's place. Names that are tied may be left out."""
        own = self.get_cell_parameters(cell)
        missing = sorted(set(own) - set(state))
        if missing:
            raise ValueError(f"weights lack {missing[0]!r} ({len(missing)} of {len(own)} missing)")
        for name, view in own.items():
            view.copy_(state[name])

    @contextmanager
    def select_cells(
        self, cells: Sequence[int], dtype: torch.dtype | None = None
    ) -> Iterator[PreTrainedModel]:
        """The model of these cells alone, for sampling: rows of its batch are theirs, in this order.

        Args:
            cells: Neighbours are read where they are; others are copied, once.
            dtype: Under autocast to this dtype, narrow what it would narrow at each token, once, here: the
                weights of linear layers. A model that is not packed is left as it is.
        """
        if list(cells) == list(range(self.size)) and dtype is None:
            yield self.model
            return
        packed = [m for m in self.model.modules() if isinstance(m, PackedModule)]
        chosen, made = _make_cell_selection(cells, self.model.device), dict[tuple[int, bool], Tensor]()
        for module in packed:
            module.select_cells(chosen, dtype, made)
        try:
            yield self.model
        finally:
            for module in packed:
                module.select_all_cells()


def _make_cell_selection(cells: Sequence[int], device: torch.device) -> CellSelection:
    """A slice if the cells are neighbours in their order, which makes views of the weights."""
    first = cells[0]
    if list(cells) == list(range(first, first + len(cells))):
        return slice(first, first + len(cells))
    return torch.tensor(list(cells), device=device)


def _stack_models(members: Sequence[PreTrainedModel]) -> PreTrainedModel:
    model = copy.deepcopy(members[0])
    _replace_modules(model, members)
    left = [n for n, p in model.named_parameters() if not _is_packed_parameter(model, n)]
    if left:
        raise CannotPack(f"no packed form for the module that holds {left[0]!r}")
    return model


def _replace_modules(model: nn.Module, members: Sequence[PreTrainedModel]) -> None:
    """Swap every module that holds weights for its packed form; shared modules stay shared."""
    made: dict[int, PackedModule] = {}
    tied: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        parts = [member.get_submodule(name) for member in members]
        if id(module) not in made:
            packed = pack_modules(name, parts)
            if packed is None:
                continue
            weight = module._parameters["weight"]
            packed.weight = tied.setdefault(id(weight), packed.weight)  # type: ignore[arg-type]
            made[id(module)] = packed
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
        if child == "relative_attention_bias":
            patch_relative_bias(model.get_submodule(parent))


def _check_same_architecture(members: Sequence[PreTrainedModel]) -> None:
    first, buffers = _describe_architecture(members[0]), dict(members[0].named_buffers())
    for position, member in enumerate(members[1:], start=1):
        traits = _describe_architecture(member)
        for name in first | traits:
            ours, other = first.get(name), traits.get(name)
            if ours != other:
                raise CannotPack(f"model {position} differs from model 0 in {name}: {other!r} and {ours!r}")
        for name, buffer in member.named_buffers():
            if name not in buffers or not torch.equal(buffer, buffers[name]):
                raise CannotPack(f"model {position} differs from model 0 in its buffer {name!r}")


def _describe_architecture(model: PreTrainedModel) -> dict[str, object]:
    """All that must be equal: class, shapes, and the configuration, which decides what shapes do not show."""
    shapes = {f"shape of {name}": tuple(p.shape) for name, p in model.named_parameters()}
    traits = {"class": type(model).__name__, "dtype": model.dtype, **shapes}
    return traits | {k: v for k, v in model.config.to_dict().items() if k not in _PROVENANCE_FIELDS}


_PROVENANCE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Entries of a configuration that say where a model comes from, not what it computes."""


def _is_packed_parameter(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), PackedModule)
