"""Declared counts of tokens change no output of any family, and spare it the look at its masks."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from gkd_lab.models.forward import Sequences, TokenCounts, compute_completion_logits
from gkd_lab.models.padding import declare_counts, declare_mask

from .families import DECODERS, FAMILIES, SINGLE, make
from .tiny import FIRST_WORD, PAD
from .tiny_classifiers import CONFIGS, tiny_classifier
from .waits import WaitCounter

SPARED = ("llama", "qwen2", "qwen3", "gpt2", "gemma3", "t5")
"""Families that read nothing else: BART's decoder makes a mask of its own, and experts are routed."""


def make_rows(prompts: list[int], completions: list[int], *, left: bool) -> Sequences:
    """Make rows with so many prompt and completion tokens each."""

    def pad(lengths: list[int], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(lengths)
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
        mask = mask if left else mask.flip(1)
        ids = FIRST_WORD + torch.arange(mask.numel()).view_as(mask) % 9
        return ids.masked_fill(mask == 0, PAD), mask

    return Sequences(*pad(prompts, left=left), *pad(completions, left=False))


CASES = {
    "full": ([4, 4, 4], [5, 5, 5]),
    "prompts": ([4, 2, 3], [5, 5, 5]),
    "completions": ([4, 4, 4], [5, 1, 3]),
    "equal widths": ([5, 2, 3], [5, 1, 3]),
    "both": ([12, 2, 3], [5, 1, 3]),  # longer than Gemma 3's window
}


def run(model: PreTrainedModel, rows: Sequences, counts: TokenCounts | None) -> tuple[Tensor, int]:
    declared = nullcontext() if counts is None else declare_counts(model, rows, counts)
    with declared, WaitCounter() as counter, torch.no_grad():
        logits = compute_completion_logits(model, rows)
    return logits, counter.waits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_bits_and_no_mask_is_read(family: str, case: str) -> None:
    model = make(family, 0, dtype=torch.float32 if family in SINGLE else None)
    rows = make_rows(*CASES[case], left=family in DECODERS)
    counts = rows.token_counts
    assert [list(counts.prompts), list(counts.completions)] == list(CASES[case])
    expected, _ = run(model, rows, None)
    logits, waits = run(model, rows, counts)
    assert torch.equal(logits, expected)
    if family in SPARED and not (family == "t5" and case == "equal widths"):
        assert waits == 0


def test_without_counts_a_model_waits() -> None:
    rows = make_rows(*CASES["both"], left=True)
    assert run(make("llama", 0), rows, None)[1] > 0


@pytest.mark.parametrize("case", ("full", "prompts"))
@pytest.mark.parametrize("name", CONFIGS)
def test_classifiers_mask_their_texts_alone(name: str, case: str) -> None:
    """The labels of their completions are no tokens."""
    model = tiny_classifier(name, "sequence-classification", 0).eval()
    model.config.pad_token_id = PAD
    rows = make_rows(CASES[case][0], [1, 1, 1], left=False)
    rows = rows.replace_completions(torch.zeros(3, 1, dtype=torch.long), torch.tensor([[1], [0], [1]]))
    expected, waits_before = run(model, rows, None)
    logits, waits = run(model, rows, rows.token_counts)
    assert torch.equal(logits, expected) and waits <= waits_before


def test_what_is_declared_holds_for_masks_of_that_shape_alone() -> None:
    model, rows = make("llama", 0), make_rows(*CASES["both"], left=True)
    expected, _ = run(model, rows, None)
    with declare_mask((3, 5), [5, 5, 5]), torch.no_grad():
        assert torch.equal(compute_completion_logits(model, rows), expected)


def test_the_functions_of_transformers_are_restored() -> None:
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError, match="stop"), declare_mask((1, 1), [1]):
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not before
        raise RuntimeError("stop")
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before


def test_items_of_blocks_are_tokens_or_rows_that_have_some() -> None:
    counts = TokenCounts((2, 2, 2, 2), (3, 0, 1, 4))
    assert counts.count_items(2, "token") == [3, 5] and counts.count_items(2, "sequence") == [1, 2]
    assert counts.split_completions(2) == [(3, 0), (1, 4)]
