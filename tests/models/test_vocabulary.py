"""Check that student and teacher share a tokenizer (pitfall 19)."""

import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.models.build import train_tokenizer
from gkd_lab.models.vocabulary import (
    find_tokenizer_difference,
    get_head_size,
    get_shared_vocabulary_size,
    load_model_tokenizer,
)

from .tiny import tiny_model, tiny_tokenizer

ENTRIES = 14


def make_model_with_head(rows: int, seed: int = 0) -> PreTrainedModel:
    """Make a model whose head is padded to `rows`."""
    torch.manual_seed(seed)
    model = tiny_model("decoder-only", seed)
    model.resize_token_embeddings(rows)
    return model


def words(text: str) -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSpec(kind="word", vocab_size=50), [text])


def make_byte_tokenizer(text: str = "some text, 12 and 345") -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSpec(kind="bpe", vocab_size=300), [text])


def test_pitfall_19_padded_heads_of_one_tokenizer_are_compared_on_the_smaller() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in ((16, 24), (24, 16)):
            student, teacher = map(make_model_with_head, rows)
            assert get_shared_vocabulary_size(student, teacher, tiny_tokenizer(), tiny_tokenizer()) == 16


def test_pitfall_19_equal_sizes_with_different_tokenizers_are_refused_with_an_example() -> None:
    student = teacher = make_model_with_head(ENTRIES)
    other = words("a b c d e f g = 1 2 x")
    assert len(other) == len(tiny_tokenizer())
    with pytest.raises(ValueError, match=r"10 vocabulary .*'3' .*id 5 .*type: uld"):
        get_shared_vocabulary_size(student, teacher, tiny_tokenizer(), other)


def test_a_token_that_a_script_added_behind_the_teachers_is_accepted_with_a_warning() -> None:
    added = tiny_tokenizer()
    added.add_special_tokens({"pad_token": "[PAD]"})
    student = teacher = make_model_with_head(ENTRIES + 2)
    with pytest.warns(UserWarning, match=r"lacks '\[PAD\]'.*padding"):
        assert get_shared_vocabulary_size(student, teacher, added, tiny_tokenizer()) == ENTRIES + 2
    # The teacher may then give probability to an entry that the student's tokenizer has no word for.
    with pytest.raises(ValueError, match=r"'\[PAD\]' .*id 14.*teacher_processing_class"):
        get_shared_vocabulary_size(student, teacher, tiny_tokenizer(), added)


def test_swapped_entries_are_a_difference() -> None:
    reason = find_tokenizer_difference(words("a a a b b c"), words("b b b a a c"))
    assert reason is not None and reason.startswith("2 vocabulary entries")
    assert reason.endswith("'a' has id 3 and id 4")


def test_tokenizers_that_split_text_differently_differ_though_their_vocabularies_agree() -> None:
    whole, digits = make_byte_tokenizer(), make_byte_tokenizer()
    digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    assert whole.get_vocab() == digits.get_vocab()
    assert "differently" in str(find_tokenizer_difference(whole, digits))
    assert find_tokenizer_difference(whole, make_byte_tokenizer()) is None


def test_a_special_token_on_one_side_only_is_a_difference() -> None:
    plain, chat = make_byte_tokenizer(), make_byte_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert "'<|im_end|>' has no id and id 274" in str(find_tokenizer_difference(plain, chat))


def test_padding_and_template_may_differ_and_another_end_of_sequence_is_a_warning() -> None:
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    teacher.pad_token, teacher.chat_template = teacher.eos_token, "{{ messages }}"
    assert find_tokenizer_difference(student, teacher) is None
    teacher.eos_token = "<unk>"
    model = make_model_with_head(ENTRIES)
    with pytest.warns(UserWarning, match="student's .*'</s>', .*teacher's .*'<unk>'"):
        assert get_shared_vocabulary_size(model, model, student, teacher) == ENTRIES


def test_different_sizes_are_refused_while_the_teachers_tokenizer_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"16 vocabulary .* 24.*teacher_processing_class"):
        get_shared_vocabulary_size(make_model_with_head(16), make_model_with_head(24), tiny_tokenizer(), None)


def test_equal_sizes_are_accepted_with_a_warning_while_the_teachers_tokenizer_is_unknown() -> None:
    with pytest.warns(UserWarning, match="not compared: .*teacher_processing_class"):
        assert (
            get_shared_vocabulary_size(
                make_model_with_head(16), make_model_with_head(16, 1), tiny_tokenizer(), None
            )
            == 16
        )


@pytest.mark.parametrize("small", ["student", "teacher"])
def test_a_head_without_a_row_for_a_real_token_is_refused(small: str) -> None:
    rows = {"student": 16, "teacher": 16, small: 13}
    student, teacher = make_model_with_head(rows["student"]), make_model_with_head(rows["teacher"])
    with pytest.raises(ValueError, match=rf"id 13, .*{small} .*resize_token_embeddings\(14\)"):
        get_shared_vocabulary_size(student, teacher, tiny_tokenizer(), tiny_tokenizer())


def test_the_size_of_the_head_counts_not_that_of_the_configuration() -> None:
    model = tiny_model("encoder-decoder", 0)
    model.config.vocab_size = 99
    assert get_head_size(model) == ENTRIES


def test_the_tokenizer_in_a_models_folder_is_loaded(tmp_path: Path) -> None:
    tiny_model("decoder-only", 0).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_model_tokenizer(type(tiny_model("decoder-only", 0)).from_pretrained(tmp_path))
    assert tokenizer is not None
    assert find_tokenizer_difference(tokenizer, tiny_tokenizer()) is None


@pytest.mark.parametrize("family", ["decoder-only", "encoder-decoder"])
def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path, family: str) -> None:
    """transformers would build an empty T5 tokenizer from the configuration alone."""
    tiny_model(family, 0).save_pretrained(tmp_path)  # type: ignore[arg-type]
    model = tiny_model(family, 0)  # type: ignore[arg-type]
    for place in (str(tmp_path), str(tmp_path / "gone"), "nobody/nothing", ""):
        model.name_or_path = place
        assert load_model_tokenizer(model) is None
