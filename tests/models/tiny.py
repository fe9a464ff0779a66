"""Tiny models with random weights and random rows, for tests that take milliseconds."""

import random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gkd_lab.config.artifact_specs import Architecture, Family, TokenizerSpec
from gkd_lab.encoding.batches import Example
from gkd_lab.models.build import make_model, train_tokenizer

FAMILIES: tuple[Family, ...] = ("decoder-only", "encoder-decoder")
WORDS = "a b c d e f g = 1 2 3"
PAD, END, FIRST_WORD, LAST_WORD = 0, 1, 3, 13


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSpec(kind="word", vocab_size=50), [WORDS])


def tiny_model(
    family: Family,
    seed: int,
    *,
    width: int = 16,
    heads: int = 4,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> PreTrainedModel:
    """Build a model of two layers, with weights large enough for the next token to depend on the context."""
    architecture = Architecture(layers=2, width=width, heads=heads, feed_forward=2 * width)
    model = make_model(family, architecture, tiny_tokenizer(), seed=seed, max_tokens=64, dropout=dropout).to(
        dtype
    )
    spread = 8 if family == "decoder-only" else 4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "shared" not in name:
                parameter.mul_(spread)
    return model


def tiny_examples(count: int = 40, seed: int = 0, longest: int = 5) -> list[Example]:
    """Make random prompts of 2 to 6 words and completions of 1 to `longest` and the end of sequence."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [draw.randint(FIRST_WORD, LAST_WORD) for _ in range(draw.randint(low, high))]

    return [Example(words(2, 6), [*words(1, longest), END]) for _ in range(count)]
