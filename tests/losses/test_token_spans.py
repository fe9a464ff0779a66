"""Two tokenizations of one text meet where both have a token's end."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.losses.token_spans import (
    DecodedText,
    TokenEnds,
    align_spans,
    decode_completion,
    encode_completion,
    non_text_ids,
)
from gkd_lab.models.build import train_tokenizer

TEXT = "the cat sat on the mat , the cats sit on mats 12 17 117 naïve 漢字 🙂 end"


def words() -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSpec(kind="word", vocab_size=60), [TEXT])


def pieces(size: int = 300) -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSpec(kind="bpe", vocab_size=size), [TEXT] * 3)


def sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: `▁` in front of words, bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<pad>", "</s>", "<unk>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat 12 17"] * 3, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]  # bytes are text
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


ALL = {"words": words, "pieces": pieces, "more pieces": lambda: pieces(340), "▁": sentence_pieces}


def decode_with(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> DecodedText:
    return decode_completion(tokenizer, ids, [tokenizer.eos_token_id], non_text_ids(tokenizer))


def encode_with(tokenizer: PreTrainedTokenizerFast, decoded: DecodedText) -> tuple[list[int], TokenEnds]:
    return encode_completion(tokenizer, decoded, non_text_ids(tokenizer), is_encoder_decoder=False)


def stretches(first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast, text: str) -> list[str]:
    """Return the text that each span covers; both sides must agree on it."""
    ids = [*first(text, add_special_tokens=False)["input_ids"], first.eos_token_id]
    decoded = decode_with(first, ids)
    _, ends = encode_with(second, decoded)
    spans, begin = [], 0
    for left, right in align_spans(decoded.ends, ends):
        last = {decoded.ends[left[-1]], ends[right[-1]]}
        assert len(last) == 1
        end = last.pop()
        assert end is not None
        spans.append("END" if end > len(decoded.text) else decoded.text[begin:end])
        begin = end
    return spans


def test_ends_that_both_have_part_the_text() -> None:
    assert align_spans([1, 3, 4, 7], [3, 4, 5, 7]) == [([0, 1], [0]), ([2], [1]), ([3], [2, 3])]
    assert align_spans([2, 4], [1, 2, 3, 4]) == [([0], [0, 1]), ([1], [2, 3])]
    assert align_spans([1, 2], [3]) == []
    assert align_spans([], [1]) == []


def test_tokens_that_end_at_one_place_stay_together() -> None:
    """As the bytes of one character do, whose offsets a tokenizer gives as the whole character's."""
    assert align_spans([1, 1, 1, 2], [1, 2]) == [([0, 1, 2], [0]), ([3], [1])]


def test_what_is_no_text_is_in_no_span() -> None:
    assert align_spans([1, None, 2, None], [1, 2]) == [([0], [0]), ([2], [1])]


def test_what_lies_behind_the_last_common_end_is_in_no_span() -> None:
    assert align_spans([1, 2, 5], [1, 2, 4]) == [([0], [0]), ([1], [1])]


def test_words_meet_pieces_at_the_words() -> None:
    assert stretches(words(), pieces(), "the cats sit") == ["the", " cats", " sit", "END"]
    assert stretches(pieces(), words(), "the cats sit") == ["the", " cats", " sit", "END"]


def test_spaces_without_a_token_on_one_side_join_the_next_span() -> None:
    assert stretches(pieces(), words(), "the  cat sat ") == ["the", "  cat", " sat", "END"]


def test_the_end_of_sequence_is_a_span_of_its_own_and_missing_where_the_text_was_cut() -> None:
    first, second = words(), pieces()
    whole = first("the cat")["input_ids"]
    for ids, count in (([*whole, first.eos_token_id], 3), (whole, 2), ([first.eos_token_id], 1)):
        decoded = decode_with(first, ids)
        _, ends = encode_with(second, decoded)
        spans = align_spans(decoded.ends, ends)
        assert len(spans) == count
        assert decoded.is_complete == (len(ids) in spans[-1][0] or ids[-1] == first.eos_token_id)


def test_what_follows_the_end_is_no_text() -> None:
    first = words()
    ids = first("the cat")["input_ids"]
    decoded = decode_with(first, [*ids, first.eos_token_id, *ids])
    assert decoded == DecodedText("the cat", [3, 7, 8, None, None], True)


def test_a_special_token_within_a_text_is_left_out() -> None:
    first = words()
    the, cat = first("the cat")["input_ids"]
    assert decode_with(first, [the, first.pad_token_id, cat]) == DecodedText("the cat", [3, None, 7], False)


def test_bytes_of_a_character_count_when_it_is_whole() -> None:
    first = pieces()
    assert decode_with(first, first("a ж!")["input_ids"]) == DecodedText("a ж!", [1, 2, 3, 3, 4], False)


def test_a_character_that_was_cut_is_no_text() -> None:
    first, second = pieces(), words()
    decoded = decode_with(first, first("the ж")["input_ids"][:-1])
    assert decoded == DecodedText("the ", [3, 4, None], False)
    assert align_spans(decoded.ends, encode_with(second, decoded)[1]) == [([0], [0])]


def test_a_text_is_told_however_it_was_split() -> None:
    """A student may write `c` `a` `t`, which its own tokenizer never would."""
    first, second = pieces(), words()
    ids = [i for letter in "the cat" for i in first(letter)["input_ids"]]
    decoded = decode_with(first, ids)
    assert decoded == DecodedText("the cat", [1, 2, 3, 4, 5, 6, 7], False)
    spans = align_spans(decoded.ends, encode_with(second, decoded)[1])
    assert spans == [([0, 1, 2], [0]), ([3, 4, 5, 6], [1])]


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
@pytest.mark.parametrize("text", ["the cat", "cats 117 , mat", "naïve 🙂 漢字 the", "  the\tcat\n", ""])
def test_every_token_of_a_whole_text_is_in_one_span(first: str, second: str, text: str) -> None:
    student, teacher = ALL[first](), ALL[second]()
    ids = [*student(text, add_special_tokens=False)["input_ids"], student.eos_token_id]
    decoded = decode_with(student, ids)
    second_ids, ends = encode_with(teacher, decoded)
    spans = align_spans(decoded.ends, ends)
    placed = [n for n, i in enumerate(ids) if i not in (student.pad_token_id, student.unk_token_id)]
    assert [n for left, _ in spans for n in left] == placed
    assert [n for _, right in spans for n in right] == list(range(len(second_ids)))
    assert second_ids[-1] == teacher.eos_token_id


@pytest.mark.parametrize("name", ALL)
def test_any_ids_are_told_as_they_are_decoded(name: str) -> None:
    """Also bytes that make up no character, which a student may well sample."""
    tokenizer, draw = ALL[name](), random.Random(0)
    special = non_text_ids(tokenizer)
    for _ in range(50):
        ids = [draw.randrange(2, len(tokenizer)) for _ in range(12)]
        decoded = decode_with(tokenizer, ids)
        whole = tokenizer.decode([i for i in ids if i not in special], clean_up_tokenization_spaces=False)
        assert whole.startswith(decoded.text)
        assert whole in (decoded.text, "") or whole.endswith("\ufffd")
        placed = [end for end in decoded.ends if end is not None]
        assert placed == sorted(placed)
        assert max(placed, default=0) == len(decoded.text)


def test_one_tokenizer_meets_itself_token_by_token() -> None:
    for make in ALL.values():
        first = make()
        ids = [*first("the cat sat on 12", add_special_tokens=False)["input_ids"], first.eos_token_id]
        decoded = decode_with(first, ids)
        second_ids, ends = encode_with(first, decoded)
        assert second_ids == ids
        assert align_spans(decoded.ends, ends) == [([n], [n]) for n in range(len(ids))]
