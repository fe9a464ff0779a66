"""Convert batches of TRL's and transformers' collators to `Sequences`."""

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq
from trl.experimental.utils import DataCollatorForChatML

from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.encoding.trl_batch import is_trl_batch, parse_trl_batch
from gkd_lab.models.forward import Sequences

from ..models.tiny import END, PAD, tiny_tokenizer
from .test_row_encoder import CHATS, chat_tokenizer, encoder


def assert_same(ours: Sequences, theirs: Sequences) -> None:
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def make_batch(rows: list[Example], *, left: bool) -> dict[str, Tensor]:
    """Make a batch in the form of transformers' collators."""
    width = max(len(e.prompt_ids + e.completion_ids) for e in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in rows:
        row = example.prompt_ids + example.completion_ids
        labels = [-100] * len(example.prompt_ids) + example.completion_ids
        for name, values, fill in zip(columns, (row, [1] * len(row), labels), (PAD, 0, -100), strict=True):
            padding = [fill] * (width - len(row))
            columns[name].append(padding + values if left else values + padding)
    return {name: torch.tensor(values) for name, values in columns.items()}


ROWS = [Example([5, 6, 7], [8, END]), Example([9], [10, 11, 12, END]), Example([3, 4, PAD, 5], [])]


def test_a_batch_of_trls_collator_equals_our_rows() -> None:
    tokenizer = chat_tokenizer()
    rows = [{"messages": messages} for messages in CHATS]
    batch = DataCollatorForChatML(tokenizer, max_length=1024)(rows)
    examples = [encoder(tokenizer)(row) for row in rows]
    assert is_trl_batch(batch)
    ours = collate_examples(examples, tokenizer.pad_token_id, is_encoder_decoder=False)
    assert_same(parse_trl_batch(batch, tokenizer.pad_token_id), ours)


@pytest.mark.parametrize("left", [True, False])
def test_a_batch_without_prompts_is_split_at_the_first_trained_token(left: bool) -> None:
    ours = collate_examples(ROWS, PAD, is_encoder_decoder=False)
    assert_same(parse_trl_batch(make_batch(ROWS, left=left), PAD), ours)


@pytest.mark.parametrize("left", [True, False])
def test_prompts_may_be_padded_on_either_side(left: bool) -> None:
    prompts = make_batch([Example(row.prompt_ids, []) for row in ROWS], left=left)
    stated = {"prompts": prompts["input_ids"], "prompt_attention_mask": prompts["attention_mask"]}
    ours = collate_examples(ROWS, PAD, is_encoder_decoder=False)
    assert_same(parse_trl_batch({**make_batch(ROWS, left=False), **stated}, PAD), ours)


def test_without_trained_tokens_the_prompts_column_is_used() -> None:
    batch = make_batch([Example([5, 6, 7], []), Example([8], [])], left=True)
    batch |= {
        "prompts": torch.tensor([[5, 6], [PAD, 8]]),
        "prompt_attention_mask": torch.tensor([[1, 1], [0, 1]]),
    }
    expected = collate_examples([Example([5, 6], []), Example([8], [])], PAD, is_encoder_decoder=False)
    assert_same(parse_trl_batch(batch, PAD), expected)


def test_untrained_tokens_after_the_answer_are_dropped() -> None:
    batch = make_batch([Example([5, 6], [7, END]), Example([8], [9, 10, 11])], left=False)
    batch["labels"][1, 3:] = -100
    expected = [Example([5, 6], [7, END]), Example([8], [9, 10])]
    assert_same(parse_trl_batch(batch, PAD), collate_examples(expected, PAD, is_encoder_decoder=False))


def test_an_encoder_decoders_batch_has_separate_source_and_target() -> None:
    rows = [{"input_ids": r.prompt_ids, "labels": r.completion_ids} for r in ROWS[:2]]
    batch = DataCollatorForSeq2Seq(tiny_tokenizer())([dict(row) for row in rows])
    ours = collate_examples(ROWS[:2], PAD, is_encoder_decoder=True)
    assert_same(parse_trl_batch(batch, PAD, is_encoder_decoder=True), ours)


def change_batch(name: str, index: tuple[int, int], value: int) -> dict[str, Tensor]:
    batch = make_batch(ROWS[:2], left=False)
    batch[name][index] = value
    return batch


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (change_batch("labels", (1, 2), -100), r"\[1\] .*several parts"),
        (change_batch("labels", (0, 3), 4), r"\[0\] .*unlike input_ids"),
        (change_batch("attention_mask", (0, 4), 0), r"\[0\] .*attention_mask is 0"),
        (change_batch("labels", (1, 0), 9), r"\[1\] .*no prompt"),
        (
            {k: v for k, v in make_batch(ROWS, left=True).items() if k != "attention_mask"},
            "no attention_mask",
        ),
    ],
)
def test_batches_that_cannot_be_split_are_refused(batch: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_trl_batch(batch, PAD)


@pytest.mark.parametrize("prompts", [[[5, 6, 7], [PAD, PAD, 10]], [[5, 6, 7], [PAD, 8, 9]]])
def test_prompts_that_contradict_the_rows_are_refused(prompts: list[list[int]]) -> None:
    ids = torch.tensor(prompts)
    batch = {**make_batch(ROWS[:2], left=False), "prompts": ids, "prompt_attention_mask": (ids != PAD).long()}
    with pytest.raises(ValueError, match=r"rows \[1\] .* other `prompts`"):
        parse_trl_batch(batch, PAD)


def test_our_batches_are_distinguished_from_trls() -> None:
    assert not is_trl_batch(collate_examples(ROWS, PAD, is_encoder_decoder=False))
    assert not is_trl_batch({"input_ids": torch.zeros(1, 1)})
    assert is_trl_batch(make_batch(ROWS, left=True))
