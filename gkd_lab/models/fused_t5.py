"""T5's decoder for sampling: fused weights, a static KV cache, about 20 kernels a layer and token.

The model's own encoder reads the prompts; keys and values of its output are computed once. Positions are a
bias of attention that depends on the distance alone, so that a token's bias is a slice of one table.
Shapes: K cells, N rows (N/K a cell), P source tokens, S slots of the cache, H width, h heads of d channels,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gkd_lab.models.decoder_parts import (
    CannotFuse,
    CommonParts,
    LinearModule,
    check_children,
    check_linear,
    check_model,
    check_parameters,
    read_weight,
)
from gkd_lab.models.forward import eval_mode
from gkd_lab.models.fused_base import (
    DecodeStart,
    StaticCache,
    TokenDecoder,
    add_product_,
    allocate_states,
    build_mask,
    fuse_activation,
    multiply,
)

MODEL_CHILDREN = frozenset({"shared", "encoder", "decoder", "lm_head"})
DECODER_CHILDREN = frozenset({"embed_tokens", "block", "final_layer_norm", "dropout"})
ATTENTION_CHILDREN = frozenset({"q", "k", "v", "o"})
MLP_CHILDREN = frozenset({"wo", "act", "dropout"})
GATED, PLAIN = ("wi_0", "wi_1"), ("wi",)


@dataclass(frozen=True)
class T5LayerParts:
    """The modules of one decoder layer; `inputs` are the MLP's first products, two if it is gated."""

    attention: Any
    attention_norm: nn.Module
    cross_attention: Any
    cross_norm: nn.Module
    mlp_norm: nn.Module
    inputs: tuple[LinearModule, ...]
    down: LinearModule
    activation: nn.Module


@dataclass(frozen=True)
class T5Parts(CommonParts):
    """The modules and sizes of a T5; `head_factor` scales the decoder's output."""

    encoder: PreTrainedModel
    layers: tuple[T5LayerParts, ...]
    head_factor: float
    start_id: int


def find_t5_parts(model: PreTrainedModel) -> T5Parts:
    """Return the modules of a T5; CannotFuse with the reason for any other model."""
    check_model(model)
    check_children("it", model, MODEL_CHILDREN)
    decoder: Any = model.get_decoder()
    config: Any = model.config
    check_children("the decoder", decoder, DECODER_CHILDREN)
    if getattr(config, "forced_bos_token_id", None) is not None:
        raise CannotFuse("its first token is forced")
    if config.decoder_start_token_id is None:
        raise CannotFuse("it has no decoder_start_token_id")
    parts = T5Parts(
        encoder=model.get_encoder(),
        embedding=decoder.embed_tokens,
        layers=tuple(_find_layer_parts(n, block) for n, block in enumerate(decoder.block)),
        final_norm=decoder.final_layer_norm,
        head=check_linear("lm_head", model.get_output_embeddings()),
        n_heads=config.num_heads,
        head_width=config.d_kv,
        norm_epsilon=config.layer_norm_epsilon,
        head_factor=config.d_model**-0.5 if config.scale_decoder_outputs else 1.0,
        start_id=config.decoder_start_token_id,
    )
    read = [*parts.encoder.modules(), parts.embedding, parts.final_norm, parts.head]
    check_parameters(model, [*read, *(module for block in decoder.block for module in block.modules())])
    return parts


def _find_layer_parts(number: int, block: Any) -> T5LayerParts:
    """Return the modules of decoder layer `number`; the first one has the table of position biases."""
    if len(block.layer) != 3:
        raise CannotFuse(f"a decoder layer has {len(block.layer)} parts")
    self_part, cross_part, mlp_part = block.layer
    check_children("attention", self_part, frozenset({"SelfAttention", "layer_norm", "dropout"}))
    check_children("attention", cross_part, frozenset({"EncDecAttention", "layer_norm", "dropout"}))
    check_children("an MLP", mlp_part, frozenset({"DenseReluDense", "layer_norm", "dropout"}))
    attention, cross_attention = self_part.SelfAttention, cross_part.EncDecAttention
    table = frozenset() if number else frozenset({"relative_attention_bias"})
    check_children("attention", attention, ATTENTION_CHILDREN | table)
    check_children("attention", cross_attention, ATTENTION_CHILDREN)
    dense = mlp_part.DenseReluDense
    names = GATED if "wi_0" in dict(dense.named_children()) else PLAIN
    check_children("an MLP", dense, MLP_CHILDREN | set(names))
    for module in (attention, cross_attention):
        for name in sorted(ATTENTION_CHILDREN):
            check_linear(name, getattr(module, name))
    return T5LayerParts(
        attention=attention,
        attention_norm=self_part.layer_norm,
        cross_attention=cross_attention,
        cross_norm=cross_part.layer_norm,
        mlp_norm=mlp_part.layer_norm,
        inputs=tuple(check_linear(name, getattr(dense, name)) for name in names),
        down=check_linear("wo", dense.wo),
        activation=dense.act,
    )


@dataclass(frozen=True)
class FusedT5Layer:
    """Weights (K, O, I) of a decoder layer; `source` computes keys and values of the encoder's output."""

    qkv: Tensor
    output: Tensor
    cross_query: Tensor
    source: Tensor
    cross_output: Tensor
    inputs: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor]
    is_gated: bool


class FusedT5Decoder(TokenDecoder):
    """Decodes with copies of a T5's weights, and its encoder.

    n_positions: Tokens of the longest completion, the start token included.
    """

    @torch.no_grad()
    def __init__(
        self,
        parts: T5Parts,
        dtype: torch.dtype,
        *,
        norm_offset: int,
        n_positions: int,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__(parts, dtype, norm_offset=norm_offset, vocabulary=vocabulary)
        self.parts = parts
        self.final_scale *= parts.head_factor
        self.layers = [self._fuse_layer(layer) for layer in parts.layers]
        self.distance_bias = self._build_distance_bias(n_positions)
        # The encoder computes as the model does, with the autocast of the caller.
        self.autocast = torch.is_autocast_enabled(self.device.type)

    def _fuse_layer(self, layer: T5LayerParts) -> FusedT5Layer:
        """Return a layer's fused weights; products without a norm before them are views of the model's."""
        attention, cross = layer.attention, layer.cross_attention
        return FusedT5Layer(
            qkv=self._fuse_weights(
                [attention.q, attention.k, attention.v], self._read_scale(layer.attention_norm)
            ),
            output=self._fuse_weights([attention.o]),
            cross_query=self._fuse_weights([cross.q], self._read_scale(layer.cross_norm)),
            source=self._fuse_weights([cross.k, cross.v]),
            cross_output=self._fuse_weights([cross.o]),
            inputs=self._fuse_weights(list(layer.inputs), self._read_scale(layer.mlp_norm)),
            down=self._fuse_weights([layer.down]),
            activation=fuse_activation(layer.activation),
            is_gated=len(layer.inputs) > 1,
        )

    def _fuse_weights(self, modules: list[LinearModule], scale: Tensor | None = None) -> Tensor:
        """Stack linear layers' weights, (K, O, I), times the scale (K, I) of their input."""
        weights = [read_weight(module) for module in modules]
        fused = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
        return (fused if scale is None else fused * scale[:, None]).to(self.dtype)

    def _build_distance_bias(self, n_positions: int) -> Tensor:
        """Return the biases of attention to tokens n - 1, ..., 1, 0 before a token, (K, h, n)."""
        attention = self.parts.layers[0].attention
        positions = torch.arange(n_positions, device=self.device)
        buckets = attention._relative_position_bucket(
            positions - (n_positions - 1),
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        table = read_weight(attention.relative_attention_bias)
        return table[:, buckets].transpose(1, 2).to(self.cache_dtype)

    # ---- forward pass ----

    @torch.no_grad()
    def read_prompts(self, ids: Tensor, mask: Tensor, room: int) -> DecodeStart:
        """Encode prompts (N, P); the cache has room for the start token and so many new tokens at first."""
        heads, width = self.parts.n_heads, self.parts.head_width
        rows, tokens = ids.shape
        device = self.device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.autocast), eval_mode(self.parts.encoder):
            encoded = self.parts.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        encoded = encoded.to(self.dtype).reshape(self.cells, -1, encoded.shape[-1])
        sources = [
            multiply(encoded, layer.source, None).view(rows, tokens, 2, heads, width).permute(2, 0, 3, 1, 4)
            for layer in self.layers
        ]
        source_mask = build_mask(mask.bool(), self.cache_dtype)[:, None, None]
        source = StaticCache(torch.stack(sources).to(self.cache_dtype), source_mask)
        shape = (len(self.layers), 2, rows, heads, 1 + room, width)
        states = allocate_states(shape, self.cache_dtype, self.device)
        cache = StaticCache(states, states.new_zeros(rows, 1, 1, 1 + room), source)
        start, positions = ids.new_full((rows, 1), self.parts.start_id), ids.new_zeros(rows, 1)
        return DecodeStart(self.forward(start, positions, cache, 1), cache, positions + 1, 1)

    @torch.no_grad()
    def forward(
        self, ids: Tensor, positions: Tensor, cache: StaticCache, length: int, slot: Tensor | None = None
    ) -> Tensor:
        """Return the logits (N, V) of the token after ids (N, 1); positions are those of the slots.

        See `TokenDecoder`.
        """
        rows, heads, width = len(ids), self.parts.n_heads, self.parts.head_width
        assert cache.source is not None
        x = self.parts.embedding(ids).view(self.cells, -1, self.head.shape[-1])
        bias = self._build_bias(cache, rows, length, slot)
        for layer, states, source in zip(
            self.layers, cache.states.unbind(), cache.source.states.unbind(), strict=True
        ):
            qkv = multiply(self.norm(x).to(self.dtype), layer.qkv, None).to(self.cache_dtype)
            qkv = qkv.view(rows, 3, heads, 1, width)
            keys_values = qkv[:, 1:].transpose(0, 1)
            if slot is None:
                states[:, :, :, length - 1 : length].copy_(keys_values)
            else:
                states.index_copy_(3, slot, keys_values)
            attended = self._attend(qkv[:, 0], states[..., :length, :], bias)
            x = add_product_(x, attended, layer.output, None)
            query = multiply(self.norm(x).to(self.dtype), layer.cross_query, None).to(self.cache_dtype)
            attended = self._attend(query.view(rows, heads, 1, width), source, cache.source.mask)
            x = add_product_(x, attended, layer.cross_output, None)
            inputs = multiply(self.norm(x).to(self.dtype), layer.inputs, None)
            if layer.is_gated:
                gate, up = inputs.chunk(2, -1)
                inputs = layer.activation(gate) * up
            else:
                inputs = layer.activation(inputs)
            x = add_product_(x, inputs, layer.down, None)
        hidden = (self.norm(x) * self.final_scale).to(self.dtype)
        return multiply(hidden, self.head, None).view(rows, -1)

    def _build_bias(self, cache: StaticCache, rows: int, length: int, slot: Tensor | None) -> Tensor:
        """Return what is added to a token's attention scores, (N or 1, h, 1, S)."""
        last = self.distance_bias.shape[-1]
        if slot is None:
            bias = self.distance_bias[..., last - length :]
        else:
            order = torch.arange(length, device=self.device) + (last - 1) - slot
            bias = self.distance_bias.index_select(2, order.clamp_max(last - 1))
        if self.cells > 1:
            bias = bias[:, None].expand(-1, rows // self.cells, -1, -1).flatten(0, 1)
        bias = bias[:, :, None]
        return bias if slot is None else bias + cache.mask[..., :length]

    def _attend(self, queries: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Attend with queries (N, h, 1, d) to keys and values (2, N, h, S, d); return (K, N/K, h*d)."""
        keys, values = states.unbind()
        attended = functional.scaled_dot_product_attention(queries, keys, values, mask, scale=1.0)
        return (
            attended.transpose(1, 2)
            .reshape(self.cells, -1, queries.shape[1] * queries.shape[3])
            .to(self.dtype)
        )
