"""Padding known on the host, so that transformers need not read masks back from the device to look for it.

Before each forward pass transformers asks a mask of two dimensions whether any token is padding, and on a GPU
waits for all work before it. Rows that were counted once answer that for every model that reads them.
Shapes: N rows, P prompt tokens, C completion tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from gkd_lab.models.attention import ATTENTION_KERNEL
from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.models.forward import Sequences, unwrap_model


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of prompt and of completion tokens of N rows, padding left out."""

    prompts: tuple[int, ...]
    completions: tuple[int, ...]

    @classmethod
    def read(cls, rows: Sequences) -> "TokenCounts":
        """Count the tokens of rows; one wait for the device."""
        counts = torch.stack([rows.prompt_mask.sum(-1), rows.completion_mask.sum(-1)])
        prompts, completions = counts.tolist()
        return cls(tuple(prompts), tuple(completions))

    def split_completions(self, count: int) -> list[tuple[int, ...]]:
        """Return the completion tokens of the rows of each of `count` blocks of equally many rows."""
        size = len(self.completions) // count
        return [self.completions[n * size : (n + 1) * size] for n in range(count)]

    def count_items(self, count: int, normalization: str) -> list[int]:
        """Return the completion tokens ("token") of each of `count` blocks, or its rows that have any."""
        blocks = self.split_completions(count)
        return [sum(block) if normalization == "token" else sum(n > 0 for n in block) for block in blocks]


@contextmanager
def declare_counts(model: Any, rows: Sequences, counts: TokenCounts | None) -> Iterator[None]:
    """Context manager of one forward pass: `model` reads the masks of `rows`, which have these counts.

    `rows` may repeat the rows that were counted. None: nothing is known, and transformers looks itself.
    """
    (count, prompt_width), completion_width = rows.prompt_mask.shape, rows.completion_mask.shape[1]
    reads_prompts_alone = _reads_prompts_alone(unwrap_model(model))
    # A decoder of another model makes a mask of its own for the completions, which has to be told apart.
    if counts is None or (reads_prompts_alone and prompt_width == completion_width):
        yield
        return
    if reads_prompts_alone:
        width, tokens = prompt_width, counts.prompts
    else:
        width = prompt_width + completion_width
        tokens = tuple(p + c for p, c in zip(counts.prompts, counts.completions, strict=True))
    with declare_mask((count, width), tokens):
        yield


def _reads_prompts_alone(model: PreTrainedModel) -> bool:
    """Return whether the mask of a forward pass covers prompts only: all but decoder-only language models."""
    return bool(model.config.is_encoder_decoder) or get_classifier_kind(model) is not None


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
