"""A Llama-like decoder for sampling: fused weights, a static KV cache, about 15 kernels a layer and token.

transformers' forward pass launches some 50 kernels a layer and token, and its cache is copied at each token.
Here query, key and value are one product, and so are gate and up; the scale of a norm is multiplied into the
weights that follow it; the two halves of a head's channels are interleaved, so that a rotation is one complex
product; keys and values are written in place. The fused weights are copies, made once for a generation.
Shapes: K cells, N rows (N/K a cell), T new tokens, S slots of the cache, H width, h heads of d channels that
share g keys, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation

from gkd_lab.models.decoder_parts import DecoderParts, LayerParts, LinearModule, read_bias, read_weight
from gkd_lab.models.forward import compute_position_ids


@dataclass(frozen=True)
class StaticCache:
    """Keys and values of all layers, (layers, 2, N, g, S, d), and the mask that is added to attention scores.

    mask: (N, 1, 1, S); 0 where a slot holds or will hold a token, else -inf.
    source: Those of an encoder's output; None without an encoder.
    """

    states: Tensor
    mask: Tensor
    source: "StaticCache | None" = None

    def count_slots(self) -> int:
        """Return S."""
        return self.states.shape[4]

    def close_slots(self, first: int) -> None:
        """Attend to none of the slots from `first` on, in place, until the mask is set to 0 there."""
        self.mask[..., first:] = -torch.inf

    def select_rows(self, rows: Tensor) -> "StaticCache":
        """Return a cache of the rows with these indices, in a copy."""
        source = None if self.source is None else self.source.select_rows(rows)
        return StaticCache(self.states.index_select(2, rows), self.mask.index_select(0, rows), source)

    def extend(self, slots: int) -> "StaticCache":
        """Return a copy with `slots` more free slots."""
        states, mask = functional.pad(self.states, (0, 0, 0, slots)), functional.pad(self.mask, (0, slots))
        return StaticCache(states, mask, self.source)


@dataclass(frozen=True)
class DecodeStart:
    """Result of reading prompts.

    logits: (N, V), of the first new token.
    positions: (N, 1), of that token in its row.
    width: Slots of the cache that are filled.
    """

    logits: Tensor
    cache: StaticCache
    positions: Tensor
    width: int


class TokenDecoder(Protocol):
    """Decodes one token at a time with a copy of a model's weights, of K = `cells` models."""

    cells: int
    device: torch.device

    def read_prompts(self, ids: Tensor, mask: Tensor, room: int) -> DecodeStart:
        """Read prompts (N, T) with their mask; the cache has room for so many new tokens at first."""
        ...

    def forward(
        self, ids: Tensor, positions: Tensor, cache: StaticCache, length: int, slot: Tensor | None = None
    ) -> Tensor:
        """Return the logits (N, V) of the token after ids (N, 1), which are written into the cache.

        Args:
            ids: Token ids.
            positions: Of the tokens in their rows, (N, 1).
            cache: Keys and values so far.
            length: Only the first slots are attended to.
            slot: (1,), where the token is written to; None: the last of the first `length` slots.
        """
        ...


class UnitNorm:
    """Scales vectors of `width` channels to the length 1: an RMS norm over the square root of the width.

    `dtype`: of the vectors.
    """

    def __init__(self, width: int, epsilon: float, device: torch.device, dtype: torch.dtype) -> None:
        self.epsilon, self.factor = epsilon, math.sqrt(width)
        self.precision = torch.float64 if dtype == torch.float64 else torch.float32
        self.floor = torch.tensor(math.sqrt(width * epsilon), dtype=self.precision, device=device)
        self.weight = torch.full((width,), 1 / self.factor, dtype=dtype, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x / sqrt(sum of its squares + width * epsilon), (..., width), at least in float32."""
        if x.is_cuda:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.precision)
        return x / torch.hypot(length, self.floor)


@dataclass(frozen=True)
class FusedLayer:
    """Weights (K, O, I) and biases (K, O) of a layer; `head_scale` is that of the head norms, (h + g, d)."""

    qkv: Tensor
    qkv_bias: Tensor | None
    head_scale: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    scaling: float


class FusedDecoder:
    """Decodes with copies of a model's weights, which do not follow later changes of the model.

    Args:
        parts: The model's modules.
        dtype: Dtype of the products, autocast's or that of the weights.
        norm_offset: 1 if norms scale by 1 + weight, as Gemma's do; else 0.
        n_positions: Tokens of the longest row, prompt and completion.
        vocabulary: Return only the logits of the first entries; None: all.
    """

    @torch.no_grad()
    def __init__(
        self,
        parts: DecoderParts,
        dtype: torch.dtype,
        *,
        norm_offset: int,
        n_positions: int,
        vocabulary: int | None = None,
    ) -> None:
        self.parts, self.dtype, self.norm_offset = parts, dtype, norm_offset
        head = read_weight(parts.head)[:, :vocabulary].to(dtype)
        bias = read_bias(parts.head)
        self.cells, self.device = len(head), head.device
        self.head, self.head_bias = head, bias if bias is None else bias[:, :vocabulary].to(dtype)
        # Rotations and the norms of heads in float32, as the model's own.
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.cache_dtype = self.wide if self.device.type == "cpu" else dtype
        stream_dtype = read_weight(parts.embedding).dtype
        self.norm = UnitNorm(head.shape[-1], parts.norm_epsilon, self.device, stream_dtype)
        self.head_norm = UnitNorm(parts.head_width, parts.norm_epsilon, self.device, self.wide)
        final_scale = self._read_scale(parts.final_norm, self.norm)
        self.final_scale = final_scale[:, None]
        self.layers = [self._fuse_layer(layer) for layer in parts.layers]
        self.turns = self._build_rotations(n_positions)

    # ---- fused weights ----

    def _read_scale(self, module: nn.Module, norm: UnitNorm) -> Tensor:
        """Return what a `UnitNorm`'s output is multiplied with, (K, width)."""
        return (read_weight(module).to(self.wide) + self.norm_offset) * norm.factor

    def _fuse_layer(self, layer: LayerParts) -> FusedLayer:
        """Return a layer's fused weights; only the attention's output may stay a view of the model's."""
        heads, width = self.parts.n_heads, self.parts.head_width
        attention_scale = self._read_scale(layer.input_norm, self.norm)
        return FusedLayer(
            qkv=self._fuse_weights([layer.query, layer.key, layer.value], attention_scale, n_paired=2),
            qkv_bias=self._fuse_biases([layer.query, layer.key, layer.value], n_paired=2),
            head_scale=self._fuse_head_norms(layer),
            # Attention returns the heads in the order (those of a key, keys).
            output=self._order_heads(read_weight(layer.output).to(self.dtype), heads, width),
            output_bias=self._cast(read_bias(layer.output)),
            gate_up=self._fuse_weights(
                [layer.gate, layer.up], self._read_scale(layer.mlp_norm, self.norm), n_paired=0
            ),
            gate_up_bias=self._fuse_biases([layer.gate, layer.up], n_paired=0),
            down=read_weight(layer.down).to(self.dtype),
            down_bias=self._cast(read_bias(layer.down)),
            activation=fuse_activation(layer.activation),
            scaling=layer.scaling,
        )

    def _fuse_weights(self, modules: list[LinearModule], scale: Tensor, *, n_paired: int) -> Tensor:
        """Stack linear layers' weights times the scale of their input, (K, O, I); pair the first channels."""
        weights = [read_weight(module) for module in modules]
        total = sum(weight.shape[1] for weight in weights)
        fused = weights[0].new_empty(self.cells, total, weights[0].shape[2], dtype=self.dtype)
        first = 0
        for index, weight in enumerate(weights):
            target = fused[:, first : first + weight.shape[1]]
            if index < n_paired:
                weight, target = self._split_halves(weight), self._split_pairs(target)
            torch.mul(weight, scale.view(self.cells, *[1] * (weight.dim() - 2), -1), out=target)
            first += modules[index].out_features
        return fused

    def _fuse_biases(self, modules: list[LinearModule], *, n_paired: int) -> Tensor | None:
        """Stack linear layers' biases, (K, O), the first ones paired; None if no layer has one."""
        biases = [read_bias(module) for module in modules]
        if all(bias is None for bias in biases):
            return None
        weights = [read_weight(module) for module in modules]
        full = [
            weight.new_zeros(weight.shape[:2]) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
        paired = [self._split_halves(bias[..., None]).flatten(1) for bias in full[:n_paired]]
        return self._cast(torch.cat([*paired, *full[n_paired:]], dim=1))

    def _fuse_head_norms(self, layer: LayerParts) -> Tensor | None:
        """Return the scales of the norms of queries and keys, (K, 1, h + g, d); None without such norms."""
        if layer.query_norm is None or layer.key_norm is None:
            return None
        counts = (self.parts.n_heads, self.parts.n_kv_heads)
        scales = [
            self._split_halves(self._read_scale(module, self.head_norm)[..., None]).flatten(1)
            for module in (layer.query_norm, layer.key_norm)
        ]
        return torch.cat(
            [scale[:, None].expand(-1, n, -1) for scale, n in zip(scales, counts, strict=True)], dim=1
        )[:, None]

    def _split_halves(self, weight: Tensor) -> Tensor:
        """View rows of (K, heads * d, I) as pairs of the halves' channels, (K, heads, d/2, 2, I)."""
        half = self.parts.head_width // 2
        return weight.reshape(len(weight), -1, 2, half, weight.shape[-1]).transpose(2, 3)

    def _split_pairs(self, weight: Tensor) -> Tensor:
        """View rows of (K, heads * d, I) as pairs of neighbours, (K, heads, d/2, 2, I)."""
        return weight.unflatten(1, (-1, self.parts.head_width // 2, 2))

    def _order_heads(self, weight: Tensor, heads: int, width: int) -> Tensor:
        """Return an output weight (K, H, h*d) for heads in the order of the attention's result."""
        keys = self.parts.n_kv_heads
        if keys == heads:
            return weight
        return weight.unflatten(2, (keys, heads // keys, width)).transpose(2, 3).flatten(2)

    def _cast(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.dtype)

    def _build_rotations(self, n_positions: int) -> Tensor:
        """Return the complex factors of every position, (positions, h + 2g, d/2): 1 for values."""
        keys, half = self.parts.n_kv_heads, self.parts.head_width // 2
        positions = torch.arange(n_positions, device=self.device)
        cos, sin = self.parts.rotary(self.head.new_empty(0, dtype=self.wide), positions[None])
        turns = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())[:, None]
        turning = turns.expand(-1, self.parts.n_heads + keys, -1)
        return torch.cat([turning, torch.ones_like(turns).expand(-1, keys, -1)], dim=1)

    # ---- forward pass ----

    @torch.no_grad()
    def read_prompts(self, ids: Tensor, mask: Tensor, room: int) -> DecodeStart:
        """Read prompts (N, T), padded on the left; the cache has room for so many new tokens at first."""
        rows, tokens = ids.shape
        keys, width = self.parts.n_kv_heads, self.parts.head_width
        shape = (len(self.layers), 2, rows, keys, tokens + room, width)
        states = allocate_states(shape, self.cache_dtype, self.device)
        is_token = mask.bool()
        order = torch.arange(tokens, device=self.device)
        # Padding attends to itself, as a softmax over nothing would be NaN.
        may_attend = (is_token[:, None] & (order[:, None] >= order)) | (order[:, None] == order)
        causal = StaticCache(states, build_mask(may_attend, self.cache_dtype)[:, None])
        logits = self.forward(ids, compute_position_ids(mask), causal, tokens)
        padding = functional.pad(build_mask(is_token, self.cache_dtype)[:, None, None], (0, room))
        return DecodeStart(logits, StaticCache(states, padding), mask.sum(1, keepdim=True), tokens)

    @torch.no_grad()
    def forward(
        self, ids: Tensor, positions: Tensor, cache: StaticCache, length: int, slot: Tensor | None = None
    ) -> Tensor:
        """Return the logits (N, V) of the token after `ids` (N, T), which are written into the cache.

        Args:
            ids: Token ids.
            positions: Of the tokens in their rows, (N, T).
            cache: Its mask is (N, 1, T, S).
            length: Only the first slots are attended to.
            slot: (1,), where a single token is written to; None: the last T of the first `length` slots.
        """
        rows, tokens = ids.shape
        heads, keys, width = self.parts.n_heads, self.parts.n_kv_heads, self.parts.head_width
        turns = self.turns.index_select(0, positions.reshape(-1)).view(rows, tokens, heads + 2 * keys, -1)
        x = self.parts.embedding(ids).view(self.cells, -1, self.head.shape[-1])
        mask = cache.mask[..., :length]
        for layer, states in zip(self.layers, cache.states.unbind(), strict=True):
            qkv = multiply(self.norm(x).to(self.dtype), layer.qkv, layer.qkv_bias).to(self.wide)
            qkv = qkv.view(self.cells, -1, heads + 2 * keys, width)
            if layer.head_scale is not None:
                qk = qkv[:, :, : heads + keys]
                qk.copy_(self.head_norm(qk) * layer.head_scale)
            pairs = torch.view_as_complex(qkv.view(rows, tokens, heads + 2 * keys, -1, 2))
            turned = torch.view_as_real(pairs * turns).flatten(3).to(self.cache_dtype)
            keys_values = turned[:, :, heads:].view(rows, tokens, 2, keys, width).permute(2, 0, 3, 1, 4)
            if slot is None:
                states[:, :, :, length - tokens : length].copy_(keys_values)
            else:
                states.index_copy_(3, slot, keys_values)
            attended = self._attend(turned[:, :, :heads], states[..., :length, :], mask, layer.scaling)
            attended = attended.reshape(self.cells, -1, heads * width).to(self.dtype)
            x = add_product_(x, attended, layer.output, layer.output_bias)
            gate, up = multiply(self.norm(x).to(self.dtype), layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = add_product_(x, layer.activation(gate) * up, layer.down, layer.down_bias)
        last = x.view(rows, tokens, -1)[:, -1].view(self.cells, -1, x.shape[-1])
        hidden = (self.norm(last) * self.final_scale).to(self.dtype)
        return multiply(hidden, self.head, self.head_bias).view(rows, -1)

    def _attend(self, queries: Tensor, states: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """Attend with queries (N, T, h, d) to keys and values (2, N, g, S, d); return (N, T, h/g, g, d)."""
        rows, tokens, heads, width = queries.shape
        keys, values = states.unbind()
        n_keys = keys.shape[1]
        if tokens == 1:
            # The heads of a key are its queries, so that keys are not repeated.
            queries = queries.view(rows, n_keys, heads // n_keys, width)
        else:
            queries = queries.transpose(1, 2)
            keys, values = (t.repeat_interleave(heads // n_keys, dim=1) for t in (keys, values))
        attended = functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scaling)
        return attended.view(rows, n_keys, -1, tokens, width).permute(0, 3, 2, 1, 4)


def fuse_activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return an activation as one kernel: T5's `gelu_new` is eight of transformers'."""
    return (
        functools.partial(functional.gelu, approximate="tanh")
        if type(module) is NewGELUActivation
        else module
    )


def allocate_states(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a cache's keys and values, not yet written."""
    # Recorded as a CUDA graph, a step multiplies free slots by 0, which must be finite.
    allocate = torch.zeros if device.type == "cuda" else torch.empty
    return allocate(shape, dtype=dtype, device=device)


def build_mask(may_attend: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to attention scores: 0 where True, else -inf."""
    zeros = torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device)
    return zeros.masked_fill_(~may_attend, -torch.inf)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply each cell's rows by its weight: (K, M, I) times (K, O, I), plus (K, O) -> (K, M, O)."""
    if len(weight) == 1:
        return functional.linear(x, weight[0], None if bias is None else bias[0])
    weight = weight.transpose(1, 2)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)


def add_product_(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Add to x (K, M, H), in place, the product of y (K, M, I) and weight (K, H, I), plus a bias (K, H)."""
    if bias is not None or x.dtype != y.dtype:
        return x.add_(multiply(y, weight, bias))
    if len(weight) == 1:
        x[0].addmm_(y[0], weight[0].t())
        return x
    return x.baddbmm_(y, weight.transpose(1, 2))
