"""Modules whose weights have a leading cell axis, in the place of those of K equal models.

The batch dimension carries the cell: row `k * B + b` belongs to cell k. Where a module's own code can work
on weights with a cell axis it does, with its weights lent to it for the time of the call.
Shapes: K cells, B rows a cell, N = K*B, T tokens, I in, O out, V vocabulary, H width.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

CellSelection = slice | Tensor
"""Which cells: neighbours, or indices, (k,)."""


class PackedModule(nn.Module):
    """Weights of K modules, stacked; `chosen` restricts a forward pass to some of the cells."""

    casts_under_autocast = False
    """Whether autocast narrows these weights, so that it may be done beforehand."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        for name, value in members[0]._parameters.items():
            own = (
                None if value is None else _stack_parameters(member.get_parameter(name) for member in members)
            )
            self.register_parameter(name, own)
        self.selected_weights: dict[str, Tensor] = {}

    def get_active_tensor(self, name: str) -> Tensor | None:
        """The stacked tensor `name`, (K, ...), of the chosen cells."""
        return self.selected_weights.get(name, self._parameters.get(name))

    def get_active_weight(self) -> Tensor:
        weight = self.get_active_tensor("weight")
        assert weight is not None
        return weight

    def select_cells(
        self, cells: CellSelection, dtype: torch.dtype | None, weight_cache: dict[tuple[int, bool], Tensor]
    ) -> None:
        """Forward passes see these cells' weights only, outside of the gradient.

        A slice is a view; indices are copied once, as are weights that change their dtype. Weights that
        modules share are looked up in `made`.
        """
        for name, value in self._parameters.items():
            if value is not None:
                # A head narrows the weights that it shares with an embedding, which does not.
                key = id(value), self.casts_under_autocast
                if key not in weight_cache:
                    own = value.detach()[cells]
                    weight_cache[key] = (
                        own.to(dtype) if dtype is not None and self.casts_under_autocast else own
                    )
                self.selected_weights[name] = weight_cache[key]

    def select_all_cells(self) -> None:
        self.selected_weights = {}


class PackedLinear(PackedModule):
    """K linear layers: one batched matrix product."""

    casts_under_autocast = True

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        super().__init__(members)
        self.in_features, self.out_features = members[0].in_features, members[0].out_features

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., I) -> (N, ..., O)."""
        return _multiply_per_cell(x, self.get_active_weight().transpose(1, 2), self.get_active_tensor("bias"))


class PackedConv1D(PackedModule):
    """K of GPT-2's linear layers, whose weights are (I, O)."""

    casts_under_autocast = True

    def __init__(self, members: Sequence[Conv1D]) -> None:
        super().__init__(members)
        self.nx, self.nf = members[0].nx, members[0].nf

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., I) -> (N, ..., O)."""
        return _multiply_per_cell(x, self.get_active_weight(), self.get_active_tensor("bias"))


class PackedEmbedding(PackedModule):
    """K embeddings: one look-up with offset ids, by the model's own code where that does more."""

    def __init__(self, members: Sequence[nn.Embedding]) -> None:
        super().__init__(members)
        first = members[0]
        self.num_embeddings, self.embedding_dim = first.num_embeddings, first.embedding_dim
        self.padding_idx = first.padding_idx
        self.lookup_module = None if type(first) is nn.Embedding else strip_weights(first)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, T) -> (N, T, H).

        Raises:
            ValueError: if the ids have another number of rows than the batch, as default positions may.
        """
        weight = self.get_active_weight()
        cells, entries, _ = weight.shape
        if ids.dim() < 2 or ids.shape[0] % cells:
            raise ValueError(
                f"ids of shape {tuple(ids.shape)} do not say which of the {cells} packed models each row "
                "belongs to: give the model ids, such as `position_ids`, for every row of the batch"
            )
        offsets = torch.arange(cells, device=ids.device)[:, None] * entries
        rows_read = self._look_up((ids.reshape(cells, -1) + offsets).view(ids.shape), weight.flatten(0, 1))
        if self.padding_idx is None or not rows_read.requires_grad:
            return rows_read
        # As in nn.Embedding, reading the padding token gives its row no gradient.
        return torch.where((ids == self.padding_idx)[..., None], rows_read.detach(), rows_read)

    def _look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        if self.lookup_module is None:
            return functional.embedding(ids, table)
        return call_with_weights(self.lookup_module, ids, weight=table)


class PackedNorm(PackedModule):
    """K modules that scale (and shift) what they normalize elementwise, each by vectors of its cell."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        self.norm = strip_weights(members[0])

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., H) -> (N, ..., H)."""
        weight, bias = self.get_active_weight(), self.get_active_tensor("bias")
        shift = {} if bias is None else {"bias": bias[:, None]}
        rows = x.reshape(weight.shape[0], -1, x.shape[-1])
        return call_with_weights(self.norm, rows, weight=weight[:, None], **shift).view(x.shape)


class PackedTorchNorm(PackedModule):
    """K norms whose weights must have the input's shape: normalized with unit scale, then scaled by cell."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        self.norm = strip_weights(members[0])

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., H) -> (N, ..., H)."""
        weight, bias = self.get_active_weight(), self.get_active_tensor("bias")
        y = self.norm(x)
        rows = y.reshape(weight.shape[0], -1, x.shape[-1])
        rows = rows * weight[:, None] if bias is None else torch.addcmul(bias[:, None], rows, weight[:, None])
        return rows.view(x.shape).to(y.dtype)


class PackedRelativeBias(PackedModule):
    """K tables of T5's relative attention bias, read as one table with K times the heads."""

    def forward(self, buckets: Tensor) -> Tensor:
        """(Q, T) -> (Q, T, K*heads)."""
        table = self.get_active_weight().transpose(0, 1).flatten(1)
        return functional.embedding(buckets, table)


def patch_relative_bias(attention: nn.Module) -> None:
    """T5 computes one bias for all rows of a batch; a pack needs each row to get its cell's."""
    compute = attention.compute_bias
    table = attention.relative_attention_bias
    rows = 1

    def remember_rows(_: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal rows
        rows = (args[0] if args else kwargs["hidden_states"]).shape[0]

    def compute_bias(*args: object, **kwargs: object) -> Tensor:
        """(1, K*heads, Q, T) of the model's own code -> (N, heads, Q, T)."""
        cells = table.get_active_weight().shape[0]  # type: ignore[operator, union-attr]
        bias = compute(*args, **kwargs)  # type: ignore[operator]
        _, heads, queries, keys = bias.shape
        by_cell = bias.view(cells, 1, heads // cells, queries, keys)
        return by_cell.expand(-1, rows // cells, -1, -1, -1).flatten(0, 1)

    attention.register_forward_pre_hook(remember_rows, with_kwargs=True)
    attention.compute_bias = compute_bias  # type: ignore[assignment]


def count_cells(model: nn.Module) -> int:
    """How many cells a batch of this model carries at the moment; 1 if it is no pack."""
    packed = next((m for m in model.modules() if isinstance(m, PackedModule)), None)
    return 1 if packed is None else packed.get_active_weight().shape[0]


def pack_modules(name: str, members: Sequence[nn.Module]) -> PackedModule | None:
    """The members' weights in one module; None if they hold none or there is no form for them."""
    first = members[0]
    if name.endswith("relative_attention_bias"):
        return PackedRelativeBias(members)
    if first._parameters.get("weight") is None:
        return None
    if type(first) is nn.Linear:
        return PackedLinear(members)  # type: ignore[arg-type]
    if type(first) is Conv1D:
        return PackedConv1D(members)
    if isinstance(first, nn.Embedding):
        return PackedEmbedding(members)  # type: ignore[arg-type]
    if isinstance(first, nn.LayerNorm | nn.RMSNorm):
        return PackedTorchNorm(members)
    return PackedNorm(members) if _holds_only_vectors(first) else None


def _holds_only_vectors(module: nn.Module) -> bool:
    """A weight, maybe a bias: such as norms are. If it is something else, the numbers will tell."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return (
        own.keys() <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values()) and not module._modules
    )


def strip_weights(module: nn.Module) -> nn.Module:
    """A copy with neutral vectors, or an empty table, as buffers in the place of its parameters."""
    # Not the weights themselves: they may be a large table.
    known = {id(p): None for p in module.parameters(recurse=False)}
    bare: nn.Module = copy.deepcopy(module, known)
    for name, value in module._parameters.items():
        if value is not None:
            del bare._parameters[name]
            shape = value.shape if value.dim() == 1 else (0, *value.shape[1:])
            plain = torch.full(shape, float(name != "bias"), dtype=value.dtype, device=value.device)
            bare.register_buffer(name, plain, persistent=False)
    return bare


def call_with_weights(module: nn.Module, x: Tensor, **weights: Tensor) -> Tensor:
    """What `module`, made by `without_weights`, makes of `x` with these; gradients flow to their sources."""
    held = module._buffers
    own = dict(held)
    held.update(weights)
    try:
        y: Tensor = module(x)
    finally:
        held.update(own)
    return y


def _multiply_per_cell(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, ..., I) times (K, I, O) plus (K, O) -> (N, ..., O)."""
    rows = x.reshape(weight.shape[0], -1, x.shape[-1])
    y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
    return y.view(*x.shape[:-1], -1)


def _stack_parameters(tensors: Iterator[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))
