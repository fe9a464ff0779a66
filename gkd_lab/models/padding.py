"""Padding known on the host, so that transformers need not read masks back from the device to look for it.

Before each forward pass transformers asks a mask of two dimensions whether any token is padding, and on a GPU
waits for all work before it. Rows that were counted once answer that for every model that reads them.
Shapes: N rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from gkd_lab.models.attention import ATTENTION_KERNEL
from gkd_lab.models.forward import Sequences, TokenCounts, is_decoder_only, unwrap_model


@contextmanager
def declare_counts(model: Any, rows: Sequences, counts: TokenCounts) -> Iterator[None]:
    """Context manager of one forward pass: `model` reads the masks of `rows`, which have these counts.

    `rows` may repeat the rows that were counted.
    """
    (count, prompt_width), completion_width = rows.prompt_mask.shape, rows.completion_mask.shape[1]
    if is_decoder_only(unwrap_model(model)):
        width = prompt_width + completion_width
        tokens = tuple(p + c for p, c in zip(counts.prompts, counts.completions, strict=True))
    elif prompt_width != completion_width:
        width, tokens = prompt_width, counts.prompts
    else:  # A decoder makes a mask of its own for the completions, which could not be told apart.
        yield
        return
    with declare_mask((count, width), tokens):
        yield


@contextmanager
def declare_mask(shape: tuple[int, int], tokens: Sequence[int]) -> Iterator[None]:
    """Context manager: masks (N, T) of this shape have so many tokens in their rows, in whatever order.

    All models' `sdpa` attention gets the mask that transformers would have built, without a look at it.
    """
    is_padded = min(tokens) < shape[1]
    build_mask = ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION_KERNEL]

    def build_known_mask(*sizes: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
        """Build the mask for attention: of padded rows always, of full rows as if there were no mask."""
        if attention_mask is not None and tuple(attention_mask.shape) == shape:
            if is_padded:
                options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            else:
                attention_mask = None
        mask: Tensor | None = build_mask(*sizes, attention_mask=attention_mask, **options)
        return mask

    ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION_KERNEL] = build_known_mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION_KERNEL] = build_mask
