"""Compute attention in float32 on a CPU whose other layers compute in bfloat16 or float16.

On a CPU the backward pass of torch's attention is three times slower in bfloat16 than in float32
(docs/log.md).
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
    """Context manager: all models' `sdpa` attention on a CPU computes at least in float32, if enabled."""
    if not enabled:
        yield
        return
    attention = ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL]

    def upcast_attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        """Attend in float32 on a CPU and cast the output back; unchanged elsewhere and in float64."""
        if query.device.type != "cpu" or query.dtype == torch.float64:
            return attention(module, query, key, value, mask, **options)
        with torch.autocast("cpu", enabled=False):
            mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
            if options.get("position_bias") is not None:  # T5 adds it to the attention scores.
                options["position_bias"] = options["position_bias"].float()
            output, weights = attention(module, query.float(), key.float(), value.float(), mask, **options)
        return output.to(query.dtype), weights

    ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL] = upcast_attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL] = attention
