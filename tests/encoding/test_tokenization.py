"""Tokenize texts with the special tokens of the model's tokenizer, which truncation keeps."""

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gkd_lab.encoding.batches import Example, encode_rows
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.encoding.tokenization import ensure_end_id, tokenize_prompts, tokenize_targets, truncate_prompt

from ..models.tiny import tiny_tokenizer

BEGIN, END, LANGUAGE = "<s>", "</s>", "<en>"


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens around a text, such as BART's `<s> $A </s>`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": BEGIN, "additional_special_tokens": [LANGUAGE]})
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (BEGIN, END, LANGUAGE) if t in template]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def encoder(tokenizer: Any, *, is_encoder_decoder: bool, **limits: Any) -> RowEncoder:
    limits = {"max_length": None, "max_new_tokens": 4, **limits}
    return RowEncoder(tokenizer, is_encoder_decoder=is_encoder_decoder, **limits)


def join_tokens(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_decoders_prompt_has_the_first_special_tokens_and_no_end(template: str) -> None:
    tokenizer = make_tokenizer(template)
    example = encoder(tokenizer, is_encoder_decoder=False)({"prompt": "a b", "completion": "c"})
    assert join_tokens(tokenizer, example.prompt_ids) == "<s> a b"
    assert join_tokens(tokenizer, example.completion_ids) == "c </s>"


def test_an_empty_prompt_of_a_decoder_is_its_bos_token() -> None:
    tokenizer = make_tokenizer("<s> $A")
    assert tokenize_prompts(tokenizer, [""], is_encoder_decoder=False) == [[tokenizer.bos_token_id]]


@pytest.mark.parametrize(
    ("template", "source", "target"),
    [
        ("$A </s>", "a b </s>", "c </s>"),
        ("<s> $A </s>", "<s> a b </s>", "<s> c </s>"),
        ("<en> $A </s>", "<en> a b </s>", "<en> c </s>"),
        ("$A </s> <en>", "a b </s> <en>", "c </s> <en>"),
    ],
    ids=["T5", "BART", "mBART-50", "mBART"],
)
def test_source_and_target_of_an_encoder_decoder_have_all_special_tokens(
    template: str, source: str, target: str
) -> None:
    tokenizer = make_tokenizer(template)
    rows: list[dict[str, Any]] = [
        {"prompt": "a b", "completion": "c"},
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]},
    ]
    for row in rows:
        example = encoder(tokenizer, is_encoder_decoder=True)(row)
        assert join_tokens(tokenizer, example.prompt_ids) == source
        assert join_tokens(tokenizer, example.completion_ids) == target


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_runner_encodes_rows_as_the_trainer_does(template: str, is_encoder_decoder: bool) -> None:
    tokenizer = make_tokenizer(template)
    (example,), cut = encode_rows(
        tokenizer,
        [("a b c", "d e")],
        is_encoder_decoder=is_encoder_decoder,
        max_input_tokens=99,
        max_output_tokens=99,
    )
    ours = encoder(tokenizer, is_encoder_decoder=is_encoder_decoder)
    assert example == ours({"prompt": "a b c", "completion": "d e"})
    assert (cut.rows, cut.prompts, cut.completions) == (1, 0, 0)


def test_no_rows_are_no_examples() -> None:
    tokenizer = tiny_tokenizer()
    for kind in (False, True):
        examples, _ = encode_rows(
            tokenizer, [], is_encoder_decoder=kind, max_input_tokens=1, max_output_tokens=1
        )
        assert examples == [] and tokenize_targets(tokenizer, [], is_encoder_decoder=kind) == []


@pytest.mark.parametrize(
    ("template", "limit", "expected"),
    [
        ("$A </s>", 3, "a b </s>"),
        ("$A </s> <en>", 3, "a </s> <en>"),
        ("<s> $A </s>", 3, "<s> a </s>"),
        ("$A", 3, "a b c"),
        ("$A </s>", 1, "a"),
        ("$A </s>", 6, "a b c d e </s>"),
    ],
)
def test_a_truncated_source_keeps_its_final_special_tokens(template: str, limit: int, expected: str) -> None:
    tokenizer = make_tokenizer(template)
    (whole,) = tokenize_prompts(tokenizer, ["a b c d e"], is_encoder_decoder=True)
    assert (
        join_tokens(tokenizer, truncate_prompt(tokenizer, whole, limit, is_encoder_decoder=True)) == expected
    )
    ours = encoder(tokenizer, is_encoder_decoder=True, max_length=max(limit, 2))
    if limit > 1:
        assert join_tokens(tokenizer, ours({"prompt": "a b c d e"}).prompt_ids) == expected


@pytest.mark.parametrize(("limit", "expected"), [(3, "<s> d e"), (1, "e"), (6, "<s> a b c d e")])
def test_a_truncated_prompt_of_a_decoder_keeps_its_bos_token_and_last_words(
    limit: int, expected: str
) -> None:
    tokenizer = make_tokenizer("<s> $A")
    (whole,) = tokenize_prompts(tokenizer, ["a b c d e"], is_encoder_decoder=False)
    assert (
        join_tokens(tokenizer, truncate_prompt(tokenizer, whole, limit, is_encoder_decoder=False)) == expected
    )


def test_any_end_token_of_the_student_is_an_end() -> None:
    tokenizer = tiny_tokenizer()
    word, pad = tokenizer.convert_tokens_to_ids("d"), tokenizer.pad_token_id
    assert ensure_end_id(tokenizer, [5, 7], [2, 7]) == [5, 7]
    assert ensure_end_id(tokenizer, [5, 7, pad], [2, 7]) == [5, 7, pad]  # no text follows
    assert ensure_end_id(tokenizer, [5, 7, word], [2, 7]) == [5, 7, word, 2]
    assert ensure_end_id(tokenizer, [5], [2, 7]) == [5, 2]
    stop = tokenizer.convert_tokens_to_ids("e")
    ours = encoder(tokenizer, is_encoder_decoder=False, end_ids=[stop])
    row = {"prompt": "a", "completion": "b e"}
    assert ours(row) == Example(*(tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", "b e")))
