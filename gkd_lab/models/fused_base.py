"""Parts that the fused decoders share: static KV cache, norms without weights, products of each cell's rows.

Shapes: K cells, N rows (N/K a cell), T new tokens, S slots of the cache, H width, h heads of d channels that
share g keys, V vocabulary.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation

from gkd_lab.models.decoder_parts import CommonParts, read_weight


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


class UnitNorm:
    """Scales vectors of `width` channels to the length 1: an RMS norm over the square root of the width.

    `dtype`: of the vectors.
    """

    def __init__(self, width: int, epsilon: float, device: torch.device, dtype: torch.dtype) -> None:
        self.epsilon = epsilon
        self.precision = torch.float64 if dtype == torch.float64 else torch.float32
        self.floor = torch.tensor(math.sqrt(width * epsilon), dtype=self.precision, device=device)
        self.weight = torch.full((width,), 1 / math.sqrt(width), dtype=dtype, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x / sqrt(sum of its squares + width * epsilon), (..., width), at least in float32."""
        if x.is_cuda:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.precision)
        return x / torch.hypot(length, self.floor)


class TokenDecoder(ABC):
    """Base class: decodes one token at a time with copies of the weights of K = `cells` models.

    Args:
        parts: The model's modules.
        dtype: Dtype of the products, autocast's or that of the weights.
        norm_offset: 1 if norms scale by 1 + weight, as Gemma's do; else 0.
        vocabulary: Return only the logits of the first entries; None: all.
    """

    @torch.no_grad()
    def __init__(
        self, parts: CommonParts, dtype: torch.dtype, *, norm_offset: int, vocabulary: int | None
    ) -> None:
        self.dtype, self.norm_offset = dtype, norm_offset
        self.head = read_weight(parts.head)[:, :vocabulary].to(dtype)
        self.cells, self.device = len(self.head), self.head.device
        # Rotations and the norms of heads in float32, as the model's own.
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.cache_dtype = self.wide if self.device.type == "cpu" else dtype
        stream_dtype = read_weight(parts.embedding).dtype
        self.norm = UnitNorm(self.head.shape[-1], parts.norm_epsilon, self.device, stream_dtype)
        self.final_scale = self._read_scale(parts.final_norm)[:, None]

    def _read_scale(self, module: nn.Module) -> Tensor:
        """Return what a `UnitNorm`'s output is multiplied with in place of this norm, (K, width)."""
        weight = read_weight(module)
        return (weight.to(self.wide) + self.norm_offset) * math.sqrt(weight.shape[-1])

    @abstractmethod
    def read_prompts(self, ids: Tensor, mask: Tensor, room: int) -> DecodeStart:
        """Read prompts (N, T) with their mask; the cache has room for so many new tokens at first."""

    @abstractmethod
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
