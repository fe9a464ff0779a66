"""Attention in float32 where a CPU computes in bfloat16 or float16.

The backward pass of torch's attention is three times slower in bfloat16 than in float32 there (docs/log.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_KERNEL = "sdpa"


@contextmanager
def upcast_cpu_attention(enabled: bool = True) -> Iterator[None]:
    """Within it transformers' `sdpa` attention of tensors on a CPU is computed in float32 at least."""
    if not enabled:
        yield
        return
    own = ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL]

    def widened(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        if query.device.type != "cpu" or query.dtype == torch.float64:
            return own(module, query, key, value, mask, **options)
        with torch.autocast("cpu", enabled=False):
            wide = mask if mask is None or mask.dtype == torch.bool else mask.float()
            found, weights = own(
                module, query.float(), key.float(), value.float(), wide, **_upcast_position_bias(options)
            )
        return found.to(query.dtype), weights

    ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL] = widened
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL] = own


def _upcast_position_bias(options: dict[str, Any]) -> dict[str, Any]:
    """T5's bias by position is added to what the softmax reads."""
    bias = options.get("position_bias")
    return options if bias is None else {**options, "position_bias": bias.float()}
