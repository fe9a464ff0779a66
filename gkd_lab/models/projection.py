"""What a model does between its last hidden states and its logits, as data that a loss can apply in pieces.

Shapes: K packed students, N tokens, H hidden width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CONVERTED_ROWS = 32_768
"""Rows of a head that are converted at once where its dtype is not the one to multiply in."""
HALVES = (torch.bfloat16, torch.float16)
WIDE_RESULTS = "dtype_out" in torch.ops.aten.baddbmm.overloads()
"""CUDA can multiply half precision into float32 (torch 2.8 and later)."""


@dataclass(frozen=True)
class Projection:
    """How logits come from a model's last hidden states: z = cap * tanh(scale * (h W^T + b) / cap).

    weight: (V, H), or (K, V, H) for K packed students; None: the "hidden states" are the logits themselves.
    bias: (V,) or (K, V), or None.
    scale: as Cohere's and Granite's. softcap: as Gemma 2's; None: no cap.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of all tokens at once, (N, V) or (K, N, V); differentiable: the reference."""
        raw = hidden if self.weight is None else hidden @ self.weight.mT
        if self.bias is not None:
            raw = raw + (self.bias if self.bias.dim() == 1 else self.bias[:, None])
        return self.logits(raw)

    def first(self, rows: int) -> "Projection":
        """Only the first `rows` entries of the vocabulary."""
        weight = None if self.weight is None else self.weight[..., :rows, :]
        bias = None if self.bias is None else self.bias[..., :rows]
        return replace(self, weight=weight, bias=bias)

    def of_cell(self, cell: int) -> "Projection":
        """One of K packed students' own; itself where nothing is packed."""
        weight = self.weight if self.weight is None or self.weight.dim() == 2 else self.weight[cell]
        bias = self.bias if self.bias is None or self.bias.dim() == 1 else self.bias[cell % len(self.bias)]
        return replace(self, weight=weight, bias=bias)

    def packed(self) -> "Projection":
        """The same with a leading K, 1 where there was none."""
        weight = self.weight if self.weight is None or self.weight.dim() == 3 else self.weight[None]
        bias = self.bias if self.bias is None or self.bias.dim() == 2 else self.bias[None]
        return replace(self, weight=weight, bias=bias)

    def rows(self, hidden: Tensor) -> int:
        """Entries of the vocabulary."""
        return hidden.shape[-1] if self.weight is None else self.weight.shape[-2]

    def logits(self, raw: Tensor) -> Tensor:
        """Scaled and capped `raw` = h W^T + b; `raw` itself where there is nothing to do."""
        scaled = raw if self.scale == 1 else raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def raw_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """A gradient by the logits made one by h W^T + b, in place."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square())
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Arithmetic:
    """Operands in the dtype that the model's own head would multiply in; sums and results in a wide one."""

    operands: torch.dtype
    results: torch.dtype

    @staticmethod
    def of(hidden: Tensor, results: torch.dtype) -> "Arithmetic":
        """As the model would do it here: what autocast does to its head counts."""
        device = hidden.device.type
        lowered = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        return Arithmetic(torch.get_autocast_dtype(device) if lowered else hidden.dtype, results)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
        """out = left @ right, batched, plus what was in `out` if `add`."""
        left, right = left.to(self.operands), right.to(self.operands)
        if out.is_cuda and self.operands in HALVES and WIDE_RESULTS:
            torch.baddbmm(out, left, right, out_dtype=self.results, beta=int(add), out=out)
        else:
            out.baddbmm_(left.to(self.results), right.to(self.results), beta=int(add))

    def spans(self, weight: Tensor) -> Iterator[slice]:
        """The rows of a head, (K, V, H), in pieces if they are to be converted, else all at once."""
        vocabulary = weight.shape[1]
        rows = vocabulary if weight.dtype == self.operands == self.results else CONVERTED_ROWS
        return (slice(start, start + rows) for start in range(0, vocabulary, rows))
