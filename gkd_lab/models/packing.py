"""K students of one architecture as one model: every weight gains a leading cell axis.

The batch dimension carries the cell: row `k * B + b` belongs to cell k, so attention, caches, masks and
`generate` of the model's own code work unchanged; only the modules that hold weights are replaced
(cf. HFTA, MLSys 2021). Shapes: K cells, B rows a cell, T tokens, I in, O out, V vocabulary, H width.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel


class CannotPack(ValueError):
    """These models cannot become one; the message says why, and each can run alone."""


class PackedModule(nn.Module):
    """Weights of K modules, stacked; `chosen` restricts a forward pass to some of the cells."""

    def __init__(self, **stacked: Tensor | None) -> None:
        super().__init__()
        for name, value in stacked.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.chosen: dict[str, Tensor] = {}

    def active(self, name: str) -> Tensor | None:
        """The stacked tensor `name`, (K, ...), of the chosen cells."""
        return self.chosen.get(name, self._parameters[name])

    def choose(self, cells: Tensor) -> None:
        """Forward passes see copies of these cells' weights only, made once, outside of the gradient."""
        for name, value in self._parameters.items():
            if value is not None:
                self.chosen[name] = value.detach()[cells]

    def choose_all(self) -> None:
        self.chosen = {}


class PackedLinear(PackedModule):
    """K linear layers: one batched matrix product."""

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        super().__init__(weight=_stack(m.weight for m in members), bias=_stack_biases(members))
        self.in_features, self.out_features = members[0].in_features, members[0].out_features

    def forward(self, x: Tensor) -> Tensor:
        """(K*B, ..., I) -> (K*B, ..., O)."""
        weight, bias = self.active("weight"), self.active("bias")
        assert weight is not None
        rows = x.reshape(weight.shape[0], -1, x.shape[-1])
        if bias is None:
            y = torch.bmm(rows, weight.transpose(1, 2))
        else:
            y = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
        return y.view(*x.shape[:-1], -1)


class PackedEmbedding(PackedModule):
    """K embeddings: one look-up with offset ids."""

    def __init__(self, members: Sequence[nn.Embedding]) -> None:
        super().__init__(weight=_stack(m.weight for m in members))
        self.num_embeddings = members[0].num_embeddings
        self.embedding_dim = members[0].embedding_dim
        self.padding_idx = members[0].padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """(K*B, T) -> (K*B, T, H)."""
        weight = self.active("weight")
        assert weight is not None
        cells, rows, _ = weight.shape
        offsets = torch.arange(cells, device=ids.device)[:, None] * rows
        shifted = (ids.reshape(cells, -1) + offsets).view(ids.shape)
        rows_read = functional.embedding(shifted, weight.flatten(0, 1))
        if self.padding_idx is None or not rows_read.requires_grad:
            return rows_read
        # As in nn.Embedding, reading the padding token gives its row no gradient.
        return torch.where((ids == self.padding_idx)[..., None], rows_read.detach(), rows_read)


class PackedNorm(PackedModule):
    """K norms: the model's own normalization with unit scale, then each cell's scale and shift."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(
            weight=_stack(m.weight for m in members),  # type: ignore[misc]
            bias=_stack_biases(members),
        )
        self.norm = copy.deepcopy(members[0])
        for name, neutral in (("weight", 1.0), ("bias", 0.0)):
            value = self.norm._parameters.pop(name, None)
            if value is not None:
                plain = torch.full_like(value.detach(), neutral)
                self.norm.register_buffer(name, plain, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(K*B, ..., H) -> (K*B, ..., H)."""
        weight, bias = self.active("weight"), self.active("bias")
        assert weight is not None
        y = self.norm(x).reshape(weight.shape[0], -1, x.shape[-1]) * weight[:, None]
        return (y if bias is None else y + bias[:, None]).view(x.shape)


class PackedRelativeBias(PackedModule):
    """K tables of T5's relative attention bias, read as one table with K times the heads."""

    def __init__(self, members: Sequence[nn.Embedding]) -> None:
        super().__init__(weight=_stack(m.weight for m in members))

    def forward(self, buckets: Tensor) -> Tensor:
        """(Q, T) -> (Q, T, K*heads)."""
        weight = self.active("weight")
        assert weight is not None
        table = weight.transpose(0, 1).flatten(1)
        return functional.embedding(buckets, table)


def _give_rows_their_bias(attention: nn.Module) -> None:
    """T5 computes one bias for all rows of a batch; a pack needs each row to get its cell's."""
    compute = attention.compute_bias
    table = attention.relative_attention_bias
    rows = 1

    def remember_rows(_: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal rows
        rows = (args[0] if args else kwargs["hidden_states"]).shape[0]

    def compute_bias(*args: object, **kwargs: object) -> Tensor:
        """(1, K*heads, Q, T) of the model's own code -> (K*B, heads, Q, T)."""
        cells = table.active("weight").shape[0]  # type: ignore[operator, union-attr]
        bias = compute(*args, **kwargs)  # type: ignore[operator]
        _, heads, queries, keys = bias.shape
        by_cell = bias.view(cells, 1, heads // cells, queries, keys)
        return by_cell.expand(-1, rows // cells, -1, -1, -1).flatten(0, 1)

    attention.register_forward_pre_hook(remember_rows, with_kwargs=True)
    attention.compute_bias = compute_bias  # type: ignore[assignment]


class Pack:
    """K models trained and sampled as one. `model` is a PreTrainedModel whose batch carries the cells."""

    def __init__(self, model: PreTrainedModel, size: int, template: PreTrainedModel) -> None:
        self.model = model
        self.size = size
        self._template = template

    @classmethod
    def alone(cls, model: PreTrainedModel) -> "Pack":
        """A pack of one: the model itself, of any architecture."""
        return cls(model, 1, model)

    @classmethod
    def of(cls, members: Sequence[PreTrainedModel]) -> "Pack":
        """Stack the weights of `members`, which are not changed. Raises CannotPack."""
        _check_alike(members)
        model = copy.deepcopy(members[0])
        _replace_modules(model, members)
        left = [n for n, p in model.named_parameters() if not _is_packed(model, n)]
        if left:
            raise CannotPack(f"no packed form for the module that holds {left[0]!r}")
        return cls(model, len(members), copy.deepcopy(members[0]))

    @property
    def is_packed(self) -> bool:
        """Whether the weights have a cell axis; a pack `alone` has none."""
        return self._template is not self.model

    def parameters_of(self, cell: int) -> dict[str, Tensor]:
        """Name -> the cell's share of each trainable parameter: a view, without gradient history."""
        named = self.model.named_parameters()
        if not self.is_packed:
            return {name: p.detach() for name, p in named if p.requires_grad}
        return {name: p.detach()[cell] for name, p in named if p.requires_grad}

    def gradients_of(self, cell: int) -> dict[str, Tensor | None]:
        """Name -> the cell's share of each parameter's gradient: a view."""
        found: dict[str, Tensor | None] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                found[name] = p.grad if p.grad is None or not self.is_packed else p.grad[cell]
        return found

    def unpack(self, cell: int) -> PreTrainedModel:
        """The cell's model, a plain one. It is reused by the next call: save it or copy it."""
        if self.is_packed:
            state = {name: value[cell] for name, value in self.model.state_dict().items()}
            self._template.load_state_dict(state)
        return self._template

    def load(self, cell: int, state: dict[str, Tensor]) -> None:
        """Put a plain model's weights into the cell's place. Names that are tied may be left out."""
        own = self.parameters_of(cell)
        missing = sorted(set(own) - set(state))
        if missing:
            raise ValueError(f"weights lack {missing[0]!r} ({len(missing)} of {len(own)} missing)")
        for name, view in own.items():
            view.copy_(state[name])

    @contextmanager
    def only(self, cells: Sequence[int]) -> Iterator[PreTrainedModel]:
        """The model of these cells alone, for sampling: rows of its batch are theirs, in this order."""
        if list(cells) == list(range(self.size)):
            yield self.model
            return
        packed = [m for m in self.model.modules() if isinstance(m, PackedModule)]
        chosen = torch.tensor(list(cells), device=self.model.device)
        for module in packed:
            module.choose(chosen)
        try:
            yield self.model
        finally:
            for module in packed:
                module.choose_all()


def _replace_modules(model: nn.Module, members: Sequence[PreTrainedModel]) -> None:
    """Swap every module that holds weights for its packed form; shared modules stay shared."""
    made: dict[int, PackedModule] = {}
    tied: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        parts = [member.get_submodule(name) for member in members]
        if id(module) not in made:
            packed = _packed(name, parts)
            if packed is None:
                continue
            weight = module._parameters["weight"]
            packed.weight = tied.setdefault(id(weight), packed.weight)  # type: ignore[arg-type]
            made[id(module)] = packed
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
        if child == "relative_attention_bias":
            _give_rows_their_bias(model.get_submodule(parent))


def _packed(name: str, parts: Sequence[nn.Module]) -> PackedModule | None:
    first = parts[0]
    if name.endswith("relative_attention_bias"):
        return PackedRelativeBias(parts)  # type: ignore[arg-type]
    if first._parameters.get("weight") is None:
        return None
    if type(first) is nn.Linear:
        return PackedLinear(parts)  # type: ignore[arg-type]
    if type(first) is nn.Embedding:
        return PackedEmbedding(parts)  # type: ignore[arg-type]
    if isinstance(first, nn.LayerNorm) or type(first).__name__ in ("T5LayerNorm", "LlamaRMSNorm"):
        return PackedNorm(parts)
    return None


def _check_alike(members: Sequence[PreTrainedModel]) -> None:
    first = _traits(members[0])
    for position, member in enumerate(members[1:], start=1):
        traits = _traits(member)
        for name in first | traits:
            ours, other = first.get(name), traits.get(name)
            if ours != other:
                raise CannotPack(f"model {position} differs from model 0 in {name}: {other!r} and {ours!r}")


def _traits(model: PreTrainedModel) -> dict[str, object]:
    """All that must be equal: class, shapes, and the configuration, which decides what shapes do not show."""
    shapes = {f"shape of {name}": tuple(p.shape) for name, p in model.named_parameters()}
    traits = {"class": type(model).__name__, "dtype": model.dtype, **shapes}
    return traits | {k: v for k, v in model.config.to_dict().items() if k not in _PROVENANCE}


_PROVENANCE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Entries of a configuration that say where a model comes from, not what it computes."""


def _is_packed(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), PackedModule)


def _stack(tensors: Iterator[Tensor]) -> Tensor:
    return torch.stack([tensor.detach() for tensor in tensors])


def _stack_biases(members: Sequence[nn.Module]) -> Tensor | None:
    biases = [getattr(member, "bias", None) for member in members]
    return (
        None if any(bias is None for bias in biases) else _stack(bias for bias in biases if bias is not None)
    )
