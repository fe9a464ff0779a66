"""Packed modules: each replaces the same module of K equal models by one whose weights have a cell axis.

Row `k * B + b` of a batch belongs to cell k. Linear and Conv1D become one batched matrix product, an
Embedding one lookup with ids offset by the cell, a norm one scaling by the cell's weight. Where the model's
own code can compute with weights that have a cell axis, it does: the packed weights are its buffers for the
time of the call.
Shapes: K cells, B rows per cell, N = K*B, T tokens, I in, O out, V vocabulary, H width.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

CellSelection = slice | Tensor
"""A selection of cells: a slice of neighbours, or indices, (k,)."""


class PackedModule(nn.Module):
    """Stacked weights of K modules; `selected_weights` restricts forward passes to some of the cells."""

    casts_under_autocast = False
    """Whether autocast casts these weights, so that they may be cast in advance."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        for name, value in members[0]._parameters.items():
            stacked = None if value is None else _stack_parameters(m.get_parameter(name) for m in members)
            self.register_parameter(name, stacked)
        self.selected_weights: dict[str, Tensor] = {}

    def get_active_tensor(self, name: str) -> Tensor | None:
        """Return parameter `name`, stacked over the selected cells, (K, ...); None if the module lacks it."""
        return self.selected_weights.get(name, self._parameters.get(name))

    def get_active_weight(self) -> Tensor:
        """Return parameter `weight`, (K, ...), stacked over the selected cells (by default all)."""
        weight = self.get_active_tensor("weight")
        assert weight is not None
        return weight

    def select_cells(
        self, cells: CellSelection, dtype: torch.dtype | None, weight_cache: dict[tuple[int, bool], Tensor]
    ) -> None:
        """Use only these cells' weights, detached, in forward calls until `select_all_cells` is called.

        Slices are views; indexed or cast weights are copied once, and `weight_cache` has those that modules
        share.
        """
        for name, value in self._parameters.items():
            if value is not None:
                # A head casts the weights that it shares with an embedding, which does not.
                key = id(value), self.casts_under_autocast
                if key not in weight_cache:
                    weights = value.detach()[cells]
                    casts = dtype is not None and self.casts_under_autocast
                    weight_cache[key] = weights.to(dtype) if casts else weights
                self.selected_weights[name] = weight_cache[key]

    def select_all_cells(self) -> None:
        """Undo `select_cells`: forward calls use the trainable weights of all cells again."""
        self.selected_weights = {}


class PackedLinear(PackedModule):
    """K linear layers as one batched matrix product."""

    casts_under_autocast = True

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        super().__init__(members)
        self.in_features, self.out_features = members[0].in_features, members[0].out_features

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each row by its cell's weight and add its cell's bias, (N, ..., I) -> (N, ..., O)."""
        return _multiply_per_cell(x, self.get_active_weight().transpose(1, 2), self.get_active_tensor("bias"))


class PackedConv1D(PackedModule):
    """K of GPT-2's linear layers, with weights (I, O), as one batched matrix product."""

    casts_under_autocast = True

    def __init__(self, members: Sequence[Conv1D]) -> None:
        super().__init__(members)
        self.nx, self.nf = members[0].nx, members[0].nf

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each row by its cell's weight and add its cell's bias, (N, ..., I) -> (N, ..., O)."""
        return _multiply_per_cell(x, self.get_active_weight(), self.get_active_tensor("bias"))


class PackedEmbedding(PackedModule):
    """K embeddings as one lookup with offset ids; a subclass of Embedding runs its own forward."""

    def __init__(self, members: Sequence[nn.Embedding]) -> None:
        super().__init__(members)
        first = members[0]
        self.num_embeddings, self.embedding_dim = first.num_embeddings, first.embedding_dim
        self.padding_idx = first.padding_idx
        self.lookup_module = None if type(first) is nn.Embedding else copy_without_weights(first)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up each row's ids in its cell's table, (N, T) -> (N, T, H); no gradient for padding ids.

        Raises:
            ValueError: if the ids do not have the batch's number of rows, as default positions may.
        """
        weight = self.get_active_weight()
        cells, entries, _ = weight.shape
        if ids.dim() < 2 or ids.shape[0] % cells:
            raise ValueError(
                f"ids of shape {tuple(ids.shape)} cannot be divided among the {cells} packed models: pass "
                "ids, such as `position_ids`, for every row of the batch"
            )
        offsets = torch.arange(0, cells * entries, entries, device=ids.device)[:, None]
        embedded = self._look_up((ids.reshape(cells, -1) + offsets).view(ids.shape), weight.flatten(0, 1))
        if self.padding_idx is None or not embedded.requires_grad:
            return embedded
        # As in nn.Embedding, the padding token's row gets no gradient.
        return torch.where((ids == self.padding_idx)[..., None], embedded.detach(), embedded)

    def _look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return the embeddings of ids, already offset by cell, from all cells' joined table, (K*V, H)."""
        if self.lookup_module is None:
            return functional.embedding(ids, table)
        return call_with_weights(self.lookup_module, ids, weight=table)


class PackedNorm(PackedModule):
    """K norms of the model's own code, which scale and shift elementwise by vectors of each cell."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        self.norm = copy_without_weights(members[0])

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then scale and shift each row by its cell's vectors, (N, ..., H) -> (N, ..., H)."""
        weight, bias = self.get_active_weight(), self.get_active_tensor("bias")
        shift = {} if bias is None else {"bias": bias[:, None]}
        rows = x.reshape(weight.shape[0], -1, x.shape[-1])
        return call_with_weights(self.norm, rows, weight=weight[:, None], **shift).view(x.shape)


class PackedTorchNorm(PackedModule):
    """K of torch's LayerNorm or RMSNorm: one norm without weights, then the scale and shift of each cell."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        self.norm = copy_without_weights(members[0])

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then scale and shift each row by its cell's vectors, (N, ..., H) -> (N, ..., H)."""
        weight, bias = self.get_active_weight(), self.get_active_tensor("bias")
        y = self.norm(x)
        rows = y.reshape(weight.shape[0], -1, x.shape[-1])
        rows = rows * weight[:, None] if bias is None else torch.addcmul(bias[:, None], rows, weight[:, None])
        return rows.view(x.shape).to(y.dtype)


class PackedRelativeBias(PackedModule):
    """K tables of T5's relative attention bias as one table with K times the heads."""

    def forward(self, buckets: Tensor) -> Tensor:
        """Look up the attention biases of all selected cells at once, (Q, T) -> (Q, T, K*heads)."""
        table = self.get_active_weight().transpose(0, 1).flatten(1)
        return functional.embedding(buckets, table)


def patch_relative_bias(attention: nn.Module) -> None:
    """Replace a T5 attention's `compute_bias`, in place, so that each batch row gets its own cell's bias."""
    compute = attention.compute_bias
    table = attention.relative_attention_bias
    row_count = 1

    def count_rows(_: nn.Module, args: tuple, kwargs: dict) -> None:
        """Store the number of rows N of the attention's input, for `compute_bias`."""
        nonlocal row_count
        row_count = (args[0] if args else kwargs["hidden_states"]).shape[0]

    def compute_bias(*args: object, **kwargs: object) -> Tensor:
        """Expand the bias of the model's own code, (1, K*heads, Q, T) -> (N, heads, Q, T)."""
        cells = table.get_active_weight().shape[0]  # type: ignore[operator, union-attr]
        bias = compute(*args, **kwargs)  # type: ignore[operator]
        _, heads, queries, keys = bias.shape
        by_cell = bias.view(cells, 1, heads // cells, queries, keys)
        return by_cell.expand(-1, row_count // cells, -1, -1, -1).flatten(0, 1)

    attention.register_forward_pre_hook(count_rows, with_kwargs=True)
    attention.compute_bias = compute_bias  # type: ignore[assignment]


def count_cells(model: nn.Module) -> int:
    """Return the number of currently selected cells of a packed model; 1 for a model that is not packed."""
    packed = next((m for m in model.modules() if isinstance(m, PackedModule)), None)
    return 1 if packed is None else packed.get_active_weight().shape[0]


def pack_modules(name: str, members: Sequence[nn.Module]) -> PackedModule | None:
    """Build one packed module from the same module of K models; None if it has no weight or packed form."""
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
    """Check whether a module looks like a norm: only a weight and perhaps a bias, both vectors, no children.

    `pack_check` will find out if it computes something else.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    are_vectors = all(p.dim() == 1 for p in parameters.values())
    return parameters.keys() <= {"weight", "bias"} and are_vectors and not module._modules


def copy_without_weights(module: nn.Module) -> nn.Module:
    """Return a copy whose parameters are placeholder buffers: vectors of 1 (bias: 0), or an empty table."""
    # The weights themselves, perhaps a large table, are not copied.
    skipped = {id(p): None for p in module.parameters(recurse=False)}
    stripped: nn.Module = copy.deepcopy(module, skipped)
    for name, value in module._parameters.items():
        if value is not None:
            del stripped._parameters[name]
            shape = value.shape if value.dim() == 1 else (0, *value.shape[1:])
            neutral = torch.full(shape, float(name != "bias"), dtype=value.dtype, device=value.device)
            stripped.register_buffer(name, neutral, persistent=False)
    return stripped


def call_with_weights(module: nn.Module, x: Tensor, **weights: Tensor) -> Tensor:
    """Return module(x) of a `copy_without_weights` with these weights for this call; gradients reach them."""
    neutral = dict(module._buffers)
    module._buffers.update(weights)
    try:
        y: Tensor = module(x)
    finally:
        module._buffers.update(neutral)
    return y


def _multiply_per_cell(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply rows by their cell's weight: (N, ..., I) times (K, I, O) plus (K, O) -> (N, ..., O)."""
    rows = x.reshape(weight.shape[0], -1, x.shape[-1])
    y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
    return y.view(*x.shape[:-1], -1)


def _stack_parameters(tensors: Iterator[nn.Parameter]) -> nn.Parameter:
    """Return one new parameter, (K, ...), that stacks copies of the same parameter of K modules."""
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))
