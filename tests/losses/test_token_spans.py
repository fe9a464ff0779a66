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


def told_by(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> DecodedText:
    return decode_completion(tokenizer, ids, [tokenizer.eos_token_id], non_text_ids(tokenizer))


def spelled_by(tokenizer: PreTrainedTokenizerFast, said: DecodedText) -> tuple[list[int], TokenEnds]:
    return encode_completion(tokenizer, said, non_text_ids(tokenizer), is_encoder_decoder=False)


def stretches(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, text: str) -> list[str]:
    """What of the text each span covers; both sides must agree on it."""
    ids = [*one(text, add_special_tokens=False)["input_ids"], one.eos_token_id]
    said = told_by(one, ids)
    _, ends = spelled_by(other, said)
    found, begin = [], 0
    for left, right in align_spans(said.ends, ends):
        last = {said.ends[left[-1]], ends[right[-1]]}
        assert len(last) == 1
        end = last.pop()
        assert end is not None
        found.append("END" if end > len(said.text) else said.text[begin:end])
        begin = end
    return found


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


def test_spaces_that_one_side_has_no_token_for_go_with_what_follows() -> None:
    assert stretches(pieces(), words(), "the  cat sat ") == ["the", "  cat", " sat", "END"]


def test_the_end_of_sequence_is_a_span_of_its_own_and_missing_where_the_text_was_cut() -> None:
    one, other = words(), pieces()
    whole = one("the cat")["input_ids"]
    for ids, count in (([*whole, one.eos_token_id], 3), (whole, 2), ([one.eos_token_id], 1)):
        said = told_by(one, ids)
        _, ends = spelled_by(other, said)
        found = align_spans(said.ends, ends)
        assert len(found) == count
        assert said.is_complete == (len(ids) in found[-1][0] or ids[-1] == one.eos_token_id)


def test_what_follows_the_end_is_no_text() -> None:
    one = words()
    ids = one("the cat")["input_ids"]
    said = told_by(one, [*ids, one.eos_token_id, *ids])
    assert said == DecodedText("the cat", [3, 7, 8, None, None], True)


def test_a_special_token_within_a_text_is_left_out() -> None:
    one = words()
    the, cat = one("the cat")["input_ids"]
    assert told_by(one, [the, one.pad_token_id, cat]) == DecodedText("the cat", [3, None, 7], False)


def test_bytes_of_a_character_count_when_it_is_whole() -> None:
    one = pieces()
    assert told_by(one, one("a ж!")["input_ids"]) == DecodedText("a ж!", [1, 2, 3, 3, 4], False)


def test_a_character_that_was_cut_is_no_text() -> None:
    one, other = pieces(), words()
    said = told_by(one, one("the ж")["input_ids"][:-1])
    assert said == DecodedText("the ", [3, 4, None], False)
    assert align_spans(said.ends, spelled_by(other, said)[1]) == [([0], [0])]


def test_a_text_is_told_however_it_was_split() -> None:
    """A student may write `c` `a` `t`, which its own tokenizer never would."""
    one, other = pieces(), words()
    ids = [i for letter in "the cat" for i in one(letter)["input_ids"]]
    said = told_by(one, ids)
    assert said == DecodedText("the cat", [1, 2, 3, 4, 5, 6, 7], False)
    found = align_spans(said.ends, spelled_by(other, said)[1])
    assert found == [([0, 1, 2], [0]), ([3, 4, 5, 6], [1])]


@pytest.mark.parametrize("one", ALL)
@pytest.mark.parametrize("other", ALL)
@pytest.mark.parametrize("text", ["the cat", "cats 117 , mat", "naïve 🙂 漢字 the", "  the\tcat\n", ""])
def test_every_token_of_a_whole_text_is_in_one_span(one: str, other: str, text: str) -> None:
    student, teacher = ALL[one](), ALL[other]()
    ids = [*student(text, add_special_tokens=False)["input_ids"], student.eos_token_id]
    said = told_by(student, ids)
    theirs, ends = spelled_by(teacher, said)
    found = align_spans(said.ends, ends)
    placed = [n for n, i in enumerate(ids) if i not in (student.pad_token_id, student.unk_token_id)]
    assert [n for left, _ in found for n in left] == placed
    assert [n for _, right in found for n in right] == list(range(len(theirs)))
    assert theirs[-1] == teacher.eos_token_id


@pytest.mark.parametrize("name", ALL)
def test_any_ids_are_told_as_they_are_decoded(name: str) -> None:
    """Also bytes that make up no character, which a student may well sample."""
    tokenizer, draw = ALL[name](), random.Random(0)
    special = non_text_ids(tokenizer)
    for _ in range(50):
        ids = [draw.randrange(2, len(tokenizer)) for _ in range(12)]
        said = told_by(tokenizer, ids)
        whole = tokenizer.decode([i for i in ids if i not in special], clean_up_tokenization_spaces=False)
        assert whole.startswith(said.text)
        assert whole in (said.text, "") or whole.endswith("\ufffd")
        placed = [end for end in said.ends if end is not None]
        assert placed == sorted(placed)
        assert max(placed, default=0) == len(said.text)


def test_one_tokenizer_meets_itself_token_by_token() -> None:
    for make in ALL.values():
        one = make()
        ids = [*one("the cat sat on 12", add_special_tokens=False)["input_ids"], one.eos_token_id]
        said = told_by(one, ids)
        theirs, ends = spelled_by(one, said)
        assert theirs == ids
        assert align_spans(said.ends, ends) == [([n], [n]) for n in range(len(ids))]
