"""Texts get around them what a model's tokenizer puts there, and keep it when they are cut."""

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gkd_lab.encoding.batches import Example, encode_rows
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.encoding.tokenization import ensure_end_id, tokenize_prompts, tokenize_targets, truncate_prompt

from ..models.tiny import tiny_tokenizer

BEGIN, END, LANGUAGE = "<s>", "</s>", "<en>"


def tokenizer_that_writes(template: str) -> PreTrainedTokenizerFast:
    """Such as `<s> $A </s>`, BART's; the tiny tokenizer's words."""
    made = tiny_tokenizer()
    made.add_special_tokens({"bos_token": BEGIN, "additional_special_tokens": [LANGUAGE]})
    special = [(t, made.convert_tokens_to_ids(t)) for t in (BEGIN, END, LANGUAGE) if t in template]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return made


def encoder(tokenizer: Any, *, is_encoder_decoder: bool, **limits: Any) -> RowEncoder:
    limits = {"max_length": None, "max_new_tokens": 4, **limits}
    return RowEncoder(tokenizer, is_encoder_decoder=is_encoder_decoder, **limits)


def shown(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_decoders_prompt_has_the_begin_of_a_text_and_no_end(template: str) -> None:
    made = tokenizer_that_writes(template)
    example = encoder(made, is_encoder_decoder=False)({"prompt": "a b", "completion": "c"})
    assert shown(made, example.prompt_ids) == "<s> a b"
    assert shown(made, example.completion_ids) == "c </s>"


def test_an_empty_prompt_of_a_decoder_is_the_begin_alone() -> None:
    made = tokenizer_that_writes("<s> $A")
    assert tokenize_prompts(made, [""], is_encoder_decoder=False) == [[made.bos_token_id]]


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
def test_source_and_target_of_an_encoder_decoder_are_as_its_tokenizer_writes_them(
    template: str, source: str, target: str
) -> None:
    made = tokenizer_that_writes(template)
    rows: list[dict[str, Any]] = [
        {"prompt": "a b", "completion": "c"},
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]},
    ]
    for row in rows:
        example = encoder(made, is_encoder_decoder=True)(row)
        assert shown(made, example.prompt_ids) == source
        assert shown(made, example.completion_ids) == target


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_runner_encodes_rows_as_the_trainer_does(template: str, is_encoder_decoder: bool) -> None:
    made = tokenizer_that_writes(template)
    (found,), cut = encode_rows(
        made,
        [("a b c", "d e")],
        is_encoder_decoder=is_encoder_decoder,
        max_input_tokens=99,
        max_output_tokens=99,
    )
    ours = encoder(made, is_encoder_decoder=is_encoder_decoder)
    assert found == ours({"prompt": "a b c", "completion": "d e"})
    assert (cut.rows, cut.prompts, cut.completions) == (1, 0, 0)


def test_no_rows_are_no_examples() -> None:
    made = tiny_tokenizer()
    for kind in (False, True):
        found = encode_rows(made, [], is_encoder_decoder=kind, max_input_tokens=1, max_output_tokens=1)
        assert found[0] == [] and tokenize_targets(made, [], is_encoder_decoder=kind) == []


@pytest.mark.parametrize(
    ("template", "limit", "kept"),
    [
        ("$A </s>", 3, "a b </s>"),
        ("$A </s> <en>", 3, "a </s> <en>"),
        ("<s> $A </s>", 3, "<s> a </s>"),
        ("$A", 3, "a b c"),
        ("$A </s>", 1, "a"),
        ("$A </s>", 6, "a b c d e </s>"),
    ],
)
def test_a_source_that_is_cut_keeps_its_end(template: str, limit: int, kept: str) -> None:
    made = tokenizer_that_writes(template)
    (whole,) = tokenize_prompts(made, ["a b c d e"], is_encoder_decoder=True)
    assert shown(made, truncate_prompt(made, whole, limit, is_encoder_decoder=True)) == kept
    ours = encoder(made, is_encoder_decoder=True, max_length=max(limit, 2))
    if limit > 1:
        assert shown(made, ours({"prompt": "a b c d e"}).prompt_ids) == kept


@pytest.mark.parametrize(("limit", "kept"), [(3, "<s> d e"), (1, "e"), (6, "<s> a b c d e")])
def test_a_decoders_prompt_that_is_cut_keeps_its_begin_and_its_last_words(limit: int, kept: str) -> None:
    made = tokenizer_that_writes("<s> $A")
    (whole,) = tokenize_prompts(made, ["a b c d e"], is_encoder_decoder=False)
    assert shown(made, truncate_prompt(made, whole, limit, is_encoder_decoder=False)) == kept


def test_any_end_at_which_the_student_stops_is_an_end() -> None:
    assert ensure_end_id([5, 7], [2, 7]) == [5, 7]
    assert ensure_end_id([5, 7, 9], [2, 7]) == [5, 7, 9]
    assert ensure_end_id([5], [2, 7]) == [5, 2]
    made = tiny_tokenizer()
    stop = made.convert_tokens_to_ids("e")
    ours = encoder(made, is_encoder_decoder=False, end_ids=[stop])
    row = {"prompt": "a", "completion": "b e"}
    assert ours(row) == Example(*(made(t, add_special_tokens=False)["input_ids"] for t in ("a", "b e")))
