"""The map from a model's last hidden states to its logits, as data that a loss can apply in chunks.

Shapes: K packed students, N tokens, H hidden width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CONVERTED_ROWS = 32_768
"""Rows of a head that are converted at a time where its dtype is not that of the product."""
HALF_DTYPES = (torch.bfloat16, torch.float16)
HAS_WIDE_RESULTS = "dtype_out" in torch.ops.aten.baddbmm.overloads()
"""CUDA can multiply half precision into float32 (torch 2.8 and later)."""


def get_product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of matrix products of tensors: autocast's, if it is on and casts them; else theirs."""
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


@dataclass(frozen=True)
class Projection:
    """Map from last hidden states to logits: z = cap * tanh(scale * (h W^T + b) / cap).

    weight: (V, H), or (K, V, H) for K packed students; None if the "hidden states" are the logits themselves.
    bias: (V,) or (K, V), or None.
    scale: as Cohere's and Granite's. softcap: as Gemma 2's, or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits of all tokens at once, (N, V) or (K, N, V), differentiably."""
        raw = hidden if self.weight is None else hidden @ self.weight.mT
        if self.bias is not None:
            raw = raw + (self.bias if self.bias.dim() == 1 else self.bias[:, None])
        return self.scale_and_cap(raw)

    def truncate_vocabulary(self, size: int) -> "Projection":
        """Return a projection to the first `size` vocabulary entries; its weight and bias are views."""
        weight = None if self.weight is None else self.weight[..., :size, :]
        bias = None if self.bias is None else self.bias[..., :size]
        return replace(self, weight=weight, bias=bias)

    def select_cell(self, cell: int) -> "Projection":
        """Return the projection of one packed student, weight (V, H); unchanged without a cell axis."""
        weight = self.weight if self.weight is None or self.weight.dim() == 2 else self.weight[cell]
        bias = self.bias if self.bias is None or self.bias.dim() == 1 else self.bias[cell % len(self.bias)]
        return replace(self, weight=weight, bias=bias)

    def select_cells(self, cells: slice | Tensor) -> "Projection":
        """Return the projection of some packed students, weight (k, V, H); a bias common to all is kept."""
        weight = None if self.weight is None else self.weight[cells]
        bias = self.bias if self.bias is None or len(self.bias) == 1 else self.bias[cells]
        return replace(self, weight=weight, bias=bias)

    def add_cell_axis(self) -> "Projection":
        """Return the projection with weight (K, V, H) and bias (K, V); K = 1 if there was no cell axis."""
        weight = self.weight if self.weight is None or self.weight.dim() == 3 else self.weight[None]
        bias = self.bias if self.bias is None or self.bias.dim() == 2 else self.bias[None]
        return replace(self, weight=weight, bias=bias)

    def get_vocabulary_size(self, hidden: Tensor) -> int:
        """Return V: rows of the weight, or without a weight the width of `hidden`, which are logits then."""
        return hidden.shape[-1] if self.weight is None else self.weight.shape[-2]

    def scale_and_cap(self, raw: Tensor) -> Tensor:
        """Return the logits of `raw` = h W^T + b: cap * tanh(scale * raw / cap); uncapped if it is None."""
        scaled = raw if self.scale == 1 else raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def compute_raw_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Convert `gradient`, d/d(logits), in place to d/d(h W^T + b), and return it; `logits`: capped."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square())
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class MatmulPrecision:
    """Dtypes of matrix products: operands as in the model's own head, sums and results in a wide dtype."""

    operand_dtype: torch.dtype
    result_dtype: torch.dtype

    @staticmethod
    def create(hidden: Tensor, result_dtype: torch.dtype) -> "MatmulPrecision":
        """Return a precision: operands in autocast's dtype if that applies, else in the dtype of `hidden`."""
        return MatmulPrecision(get_product_dtype(hidden.device, hidden.dtype), result_dtype)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        """Write the batched product left @ right into `out`, or add it to `out` if `accumulate`."""
        left, right = left.to(self.operand_dtype), right.to(self.operand_dtype)
        if self._multiplies_into_wide(out):
            torch.baddbmm(out, left, right, out_dtype=self.result_dtype, beta=int(accumulate), out=out)
        else:
            out.baddbmm_(left.to(self.result_dtype), right.to(self.result_dtype), beta=int(accumulate))

    def _multiplies_into_wide(self, tensor: Tensor) -> bool:
        """Check whether the tensor's device multiplies operands of this precision into a wider dtype."""
        return tensor.is_cuda and self.operand_dtype in HALF_DTYPES and HAS_WIDE_RESULTS

    def convert_head(self, head: Projection) -> Projection:
        """Return a head with its weight in the operands' dtype, converted once instead of by each chunk.

        Not on a CPU, where it is converted by rows, so that no copy of a large head is kept.
        """
        if head.weight is None or head.weight.device.type == "cpu":
            return head
        return replace(head, weight=head.weight.to(self.operand_dtype))

    def split_rows(self, weight: Tensor) -> Iterator[slice]:
        """Yield slices over V of a head (K, V, H): 32,768 rows in all, or one if nothing is converted."""
        vocabulary = weight.shape[1]
        is_operand = weight.dtype == self.operand_dtype
        is_converted = not is_operand or (
            self.operand_dtype != self.result_dtype and not self._multiplies_into_wide(weight)
        )
        rows = max(CONVERTED_ROWS // len(weight), 1) if is_converted else vocabulary
        return (slice(start, start + rows) for start in range(0, vocabulary, rows))
