"""Tokenizers compared by their files are equal where they are once loaded, as far as files can tell."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gkd_lab.config.tokenizer_files import TokenizerFiles, find_vocabulary_difference
from gkd_lab.models.build import load_tokenizer
from gkd_lab.models.vocabulary import find_tokenizer_difference

WORDS = {"<unk>": 0, "<pad>": 1, "a": 2, "b": 3, "Hello": 4, "!": 5}


def write_tokenizer(
    folder: Path, ids: dict[str, int], added: tuple[str, ...] = (), split_punctuation: bool = True
) -> Path:
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Whitespace() if split_punctuation else pre_tokenizers.WhitespaceSplit()
    )
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    loaded.add_tokens(list(added))
    loaded.save_pretrained(folder)
    return folder


def name_special_token(folder: Path, token: str) -> Path:
    """Name a special token that tokenizer.json lacks, so that loading adds it."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": token}))
    return folder


def compare(teacher: Path, student: Path) -> tuple[str | None, str | None]:
    """Return what the files say, and what the loaded tokenizers are, as the runner compares them."""
    return (
        find_vocabulary_difference(TokenizerFiles(teacher), TokenizerFiles(student)),
        find_tokenizer_difference(load_tokenizer(student), load_tokenizer(teacher)),
    )


CASES: dict[str, Callable[[Path], Path]] = {
    "equal": lambda folder: write_tokenizer(folder, WORDS),
    "a token more": lambda folder: write_tokenizer(folder, {**WORDS, "c": 6}),
    "a token less": lambda folder: write_tokenizer(folder, {k: v for k, v in WORDS.items() if k != "!"}),
    "an added token": lambda folder: write_tokenizer(folder, WORDS, ("<x>",)),
    "an added token that has the next id anyway": lambda folder: write_tokenizer(
        folder, {k: v for k, v in WORDS.items() if k != "!"}, ("!",)
    ),
    "two ids swapped": lambda folder: write_tokenizer(folder, {**WORDS, "a": 3, "b": 2}),
    "a token at another free id": lambda folder: write_tokenizer(folder, {**WORDS, "!": 9}),
    "other rules": lambda folder: write_tokenizer(folder, WORDS, split_punctuation=False),
    "a special token that is named": lambda folder: name_special_token(
        write_tokenizer(folder, WORDS, ("<x>",)), "<x>"
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_student", [False, True])
def test_files_tell_a_difference_where_the_loaded_tokenizers_have_one(
    case: str, is_student: bool, tmp_path: Path
) -> None:
    plain, other = write_tokenizer(tmp_path / "plain", WORDS), CASES[case](tmp_path / "other")
    by_files, loaded = compare(*((plain, other) if is_student else (other, plain)))
    assert (by_files is None) == (loaded is None), (by_files, loaded)
    assert (by_files is None) == (case == "equal" or "next id" in case)


def test_a_special_token_that_loading_adds_is_no_difference(tmp_path: Path) -> None:
    stored = write_tokenizer(tmp_path / "stored", WORDS, ("<x>",))
    named = name_special_token(write_tokenizer(tmp_path / "named", WORDS), "<x>")
    for pair in ((stored, named), (named, stored)):
        assert compare(*pair) == (None, None)


def test_special_tokens_of_a_models_own_class_are_left_to_the_run(tmp_path: Path) -> None:
    stored = write_tokenizer(tmp_path / "stored", WORDS, ("<s>",))
    llama = write_tokenizer(tmp_path / "llama", WORDS)
    path = llama / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    files = TokenizerFiles(stored), TokenizerFiles(llama)
    assert find_vocabulary_difference(*files) is None
    larger = write_tokenizer(tmp_path / "larger", {**WORDS, "c": 6})
    assert "the teacher alone has 1 of its tokens, such as 'c' (id 6)" in str(
        find_vocabulary_difference(TokenizerFiles(larger), files[1])
    )


def test_tokens_behind_the_teachers_last_are_allowed_where_the_student_added_them(tmp_path: Path) -> None:
    plain = TokenizerFiles(write_tokenizer(tmp_path / "plain", WORDS))
    added = TokenizerFiles(write_tokenizer(tmp_path / "added", WORDS, ("<x>",)))
    own = TokenizerFiles(write_tokenizer(tmp_path / "own", {**WORDS, "c": 6}))
    assert find_vocabulary_difference(plain, added, allows_appended=True) is None
    for pair in ((plain, own), (added, plain)):
        assert find_vocabulary_difference(*pair, allows_appended=True) is not None
