"""A Llama-like decoder for sampling: fused weights, a static KV cache, about 15 kernels a layer and token.

transformers' forward pass launches some 50 kernels a layer and token, and its cache is copied at each token.
Here query, key and value are one product, and so are gate and up; the scale of a norm is multiplied into the
weights that follow it; the two halves of a head's channels are interleaved, so that a rotation is one complex
product; keys and values are written in place. The fused weights are copies, made once for a generation.
Shapes: K cells, N rows (N/K a cell), T new tokens, S slots of the cache, H width, h heads of d channels that
share g keys, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gkd_lab.models.decoder_parts import DecoderParts, LayerParts, LinearModule, read_bias, read_weight
from gkd_lab.models.forward import compute_position_ids
from gkd_lab.models.fused_base import (
    DecodeStart,
    StaticCache,
    TokenDecoder,
    UnitNorm,
    add_product_,
    allocate_states,
    build_mask,
    fuse_activation,
    multiply,
)


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


class FusedDecoder(TokenDecoder):
    """Decodes with copies of a model's weights, which do not follow later changes of the model.

    n_positions: Tokens of the longest row, prompt and completion.
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
        super().__init__(parts, dtype, norm_offset=norm_offset, vocabulary=vocabulary)
        self.parts = parts
        bias = read_bias(parts.head)
        self.head_bias = bias if bias is None else bias[:, :vocabulary].to(dtype)
        self.head_norm = UnitNorm(parts.head_width, parts.norm_epsilon, self.device, self.wide)
        self.layers = [self._fuse_layer(layer) for layer in parts.layers]
        self.turns = self._build_rotations(n_positions)

    # ---- fused weights ----

    def _fuse_layer(self, layer: LayerParts) -> FusedLayer:
        """Return a layer's fused weights; only the attention's output may stay a view of the model's."""
        heads, width = self.parts.n_heads, self.parts.head_width
        attention_scale = self._read_scale(layer.input_norm)
        return FusedLayer(
            qkv=self._fuse_weights([layer.query, layer.key, layer.value], attention_scale, n_paired=2),
            qkv_bias=self._fuse_biases([layer.query, layer.key, layer.value], n_paired=2),
            head_scale=self._fuse_head_norms(layer),
            # Attention returns the heads in the order (those of a key, keys).
            output=self._order_heads(read_weight(layer.output).to(self.dtype), heads, width),
            output_bias=self._cast(read_bias(layer.output)),
            gate_up=self._fuse_weights([layer.gate, layer.up], self._read_scale(layer.mlp_norm), n_paired=0),
            gate_up_bias=self._fuse_biases([layer.gate, layer.up], n_paired=0),
            down=read_weight(layer.down).to(self.dtype),
            down_bias=self._cast(read_bias(layer.down)),
            activation=fuse_activation(layer.activation),
            scaling=layer.scaling,
        )

    def _fuse_weights(self, modules: list[LinearModule], scale: Tensor, *, n_paired: int) -> Tensor:
        """Stack linear layers' weights times the scale of their input, (K, O, I); pair the first channels."""
        weights = [read_weight(module) for module in modules]
        sizes = [weight.shape[1] for weight in weights]
        fused = weights[0].new_empty(self.cells, sum(sizes), weights[0].shape[2], dtype=self.dtype)
        for index, (weight, target) in enumerate(zip(weights, fused.split(sizes, dim=1), strict=True)):
            if index < n_paired:
                weight, target = self._split_halves(weight), self._split_pairs(target)
            torch.mul(weight, scale.view(self.cells, *[1] * (weight.dim() - 2), -1), out=target)
        return fused

    def _fuse_biases(self, modules: list[LinearModule], *, n_paired: int) -> Tensor | None:
        """Stack linear layers' biases, (K, O), the first ones paired; None if no layer has one."""
        biases = [read_bias(module) for module in modules]
        if all(bias is None for bias in biases):
            return None
        full = [
            self.head.new_zeros(self.cells, module.out_features) if bias is None else bias
            for module, bias in zip(modules, biases, strict=True)
        ]
        paired = [self._split_halves(bias[..., None]).flatten(1) for bias in full[:n_paired]]
        return self._cast(torch.cat([*paired, *full[n_paired:]], dim=1))

    def _fuse_head_norms(self, layer: LayerParts) -> Tensor | None:
        """Return the scales of the norms of queries and keys, (K, 1, h + g, d); None without such norms."""
        if layer.query_norm is None or layer.key_norm is None:
            return None
        counts = (self.parts.n_heads, self.parts.n_kv_heads)
        scales = [
            self._split_halves(self._read_scale(module)[..., None]).flatten(1)
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
