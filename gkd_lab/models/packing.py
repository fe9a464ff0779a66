"""Pack K students of one architecture into one model, so that they train and sample in the same batch.

Every weight gains a leading cell axis: a Linear becomes a batched matrix product, an Embedding adds an offset
to the ids, a norm scales each row by its cell's weight (`packed_layers`). The batch dimension carries the
cell, row `k * B + b` being row b of cell k, so the model's own attention, caches, masks and `generate` work
unchanged. Each pack is compared with its members first (`pack_check`). Cf. HFTA, MLSys 2021. Shapes: K cells,
B rows per cell.
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
    PackedModule,
    pack_modules,
    patch_relative_bias,
)


class Pack:
    """K models that train and sample as one: `model` is a PreTrainedModel whose batch carries the cells."""

    def __init__(self, model: PreTrainedModel, size: int, template: PreTrainedModel) -> None:
        self.model = model
        self.size = size
        self._template = template

    @classmethod
    def build_single(cls, model: PreTrainedModel) -> "Pack":
        """Return a pack of one cell around a model of any kind, which is neither copied nor changed."""
        return cls(model, 1, model)

    @classmethod
    def build(cls, members: Sequence[PreTrainedModel]) -> "Pack":
        """Return a pack of copies of K models; CannotPack unless it computes the same as each model alone.

        Compares packed and single outputs, first of two perturbed copies of member 0, then of the members.
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
        """Whether the weights have a cell axis; False for a pack made by `build_single`."""
        return self._template is not self.model

    def get_trainable_weights(self) -> dict[str, Tensor]:
        """Return name -> each trainable parameter of all cells, (K, ...) if packed, detached."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def get_cell_parameters(self, cell: int) -> dict[str, Tensor]:
        """Return name -> the cell's detached view of each trainable parameter; writing changes the pack."""
        weights = self.get_trainable_weights()
        return {name: weight[cell] for name, weight in weights.items()} if self.is_packed else weights

    def get_cell_gradients(self, cell: int) -> dict[str, Tensor | None]:
        """Return name -> the cell's gradient (a view) of each trainable parameter; None where it has none."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.is_packed:
            return gradients
        return {name: grad if grad is None else grad[cell] for name, grad in gradients.items()}

    def unpack_cell(self, cell: int) -> PreTrainedModel:
        """Copy the cell's weights into a plain model and return it; the next call overwrites that model.

        A pack made by `build_single` returns its own model.
        """
        if self.is_packed:
            state = {
                name: value[cell] if _is_packed_parameter(self.model, name) else value
                for name, value in self.model.state_dict().items()
            }
            self._template.load_state_dict(state)
        return self._template

    def load_cell(self, cell: int, state: dict[str, Tensor]) -> None:
        """Overwrite a cell's weights by a plain model's state dict, which may lack only tied names."""
        parameters = self.get_cell_parameters(cell)
        missing = sorted(set(parameters) - set(state))
        if missing:
            raise ValueError(f"weights lack {missing[0]!r} ({len(missing)} of {len(parameters)} missing)")
        for name, view in parameters.items():
            view.copy_(state[name])

    @contextmanager
    def select_cells(
        self, cells: Sequence[int], dtype: torch.dtype | None = None
    ) -> Iterator[PreTrainedModel]:
        """Context manager: restrict the yielded model to these cells; its batch then has only their rows.

        Args:
            cells: Neighbouring cells are views of the weights; others are copied once.
            dtype: Cast the weights of linear layers to this dtype once, instead of by autocast at each token.
                A model that is not packed is left as it is.
        """
        if list(cells) == list(range(self.size)) and dtype is None:
            yield self.model
            return
        packed_modules = [m for m in self.model.modules() if isinstance(m, PackedModule)]
        selection = _make_cell_selection(cells, self.model.device)
        weight_cache: dict[tuple[int, bool], Tensor] = {}
        for module in packed_modules:
            module.select_cells(selection, dtype, weight_cache)
        try:
            yield self.model
        finally:
            for module in packed_modules:
                module.select_all_cells()


def _make_cell_selection(cells: Sequence[int], device: torch.device) -> CellSelection:
    """Return a slice for consecutive ascending cells, whose weights are views; else a tensor of indices."""
    first = cells[0]
    if list(cells) == list(range(first, first + len(cells))):
        return slice(first, first + len(cells))
    return torch.tensor(list(cells), device=device)


def _stack_models(members: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """Return a new packed model of the members; CannotPack if a weight's module has no packed form."""
    model = copy.deepcopy(members[0])
    _replace_modules(model, members)
    unpacked = [n for n, p in model.named_parameters() if not _is_packed_parameter(model, n)]
    if unpacked:
        raise CannotPack(f"no packed form for the module that holds {unpacked[0]!r}")
    return model


def _replace_modules(model: nn.Module, members: Sequence[PreTrainedModel]) -> None:
    """Replace in `model` each module with weights by the members' packed form; shared ones stay shared."""
    packed_by_id: dict[int, PackedModule] = {}
    tied_weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in packed_by_id:
            packed = pack_modules(name, [member.get_submodule(name) for member in members])
            if packed is None:
                continue
            weight = module._parameters["weight"]
            packed.weight = tied_weights.setdefault(id(weight), packed.weight)  # type: ignore[arg-type]
            packed_by_id[id(module)] = packed
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed_by_id[id(module)])
        if child == "relative_attention_bias":
            patch_relative_bias(model.get_submodule(parent))


def _check_same_architecture(members: Sequence[PreTrainedModel]) -> None:
    """Raise CannotPack if a member differs from member 0 in class, dtype, config, shapes or buffers."""
    reference, buffers = _describe_architecture(members[0]), dict(members[0].named_buffers())
    for index, member in enumerate(members[1:], start=1):
        traits = _describe_architecture(member)
        for name in reference | traits:
            expected, value = reference.get(name), traits.get(name)
            if expected != value:
                raise CannotPack(f"model {index} differs from model 0 in {name}: {value!r} and {expected!r}")
        for name, buffer in member.named_buffers():
            if name not in buffers or not torch.equal(buffer, buffers[name]):
                raise CannotPack(f"model {index} differs from model 0 in its buffer {name!r}")


def _describe_architecture(model: PreTrainedModel) -> dict[str, object]:
    """Return name -> value of what members must share: class, dtype, parameter shapes and config fields."""
    shapes = {f"shape of {name}": tuple(p.shape) for name, p in model.named_parameters()}
    traits = {"class": type(model).__name__, "dtype": model.dtype, **shapes}
    return traits | {k: v for k, v in model.config.to_dict().items() if k not in _PROVENANCE_FIELDS}


_PROVENANCE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Configuration fields about a model's origin, which do not change its outputs."""


def _is_packed_parameter(model: nn.Module, parameter: str) -> bool:
    """Check whether the parameter of this dotted name belongs to a `PackedModule`."""
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), PackedModule)
