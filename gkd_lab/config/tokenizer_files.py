"""Tokenizers of checkpoint folders, compared by their files as far as these tell what loading makes of them.

Loading may add special tokens that `tokenizer.json` lacks: those that the other files name, and those that a
model's own class has by default. Whether a tokenizer gets such a token is left to the run.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

PROBE_TEXTS = (
    "Hello, world! Don't we'll I've",
    "  two spaces\n\n\tand a tab \r\n  ",
    "naïve café, Ünïcödé ﬁ ｆｕｌｌ, 漢字かな, 한국어, العربية, हिन्दी, ру́сский, 🙂👩‍👩‍👧 e\u0301",
    "0 007 3.14159 1,000,000 2024-01-31 ½ ²",
    "def f(x):\n    return {'a': x ** 2}  # <b>&amp;</b> \\n $x_1$\n",
)
"""Texts that tokenizers of equal vocabularies split differently if their rules differ."""
_PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
"""Classes that are as `tokenizer.json` says, with the tokens that the other files name."""
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_json_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; {} without a valid one."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


class TokenizerFiles:
    """A tokenizer of a folder, by `tokenizer.json` and the files of settings beside it.

    Raises the library's bare Exception for a `tokenizer.json` that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._folder = folder
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Token -> id of all entries, added ones included."""
        ids: dict[str, int] = self._tokenizer.get_vocab()
        return ids

    @cached_property
    def added_tokens(self) -> Collection[str]:
        """Entries that are no part of the model of the tokenizer, such as special tokens."""
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    @cached_property
    def _settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Fields of the other files by name; {} for one that is missing or damaged."""
        return {name: read_json_fields(self._folder / name) for name in _SETTINGS_FILES}

    @cached_property
    def is_plain(self) -> bool:
        """Whether its class adds no tokens and no rules of its own."""
        return self._settings["tokenizer_config.json"].get("tokenizer_class") in _PLAIN_CLASSES

    @cached_property
    def _named_tokens(self) -> Collection[str]:
        """All texts in the files of settings: special tokens are among them."""
        return set(_list_texts(self._settings))

    def may_add(self, token: str) -> bool:
        """Return whether loading may add a special token that `tokenizer.json` lacks."""
        return not self.is_plain or token in self._named_tokens

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _list_texts(content: Any) -> Iterator[str]:
    """Yield the texts in plain data, keys included."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from content
        yield from (text for part in content.values() for text in _list_texts(part))
    elif isinstance(content, list):
        yield from (text for part in content for text in _list_texts(part))


def find_vocabulary_difference(
    teacher: TokenizerFiles, student: TokenizerFiles, *, allows_appended: bool = False
) -> str | None:
    """Return how two tokenizers differ, with an example; None if they are equal, as far as files tell.

    A loss that compares token by token needs every entry of both: the student would write a token that the
    teacher does not know, or the teacher give probability to one that the student has not. allows_appended:
    The student may have added tokens behind the teacher's last.
    """
    tokens = {number: token for token, number in student.ids.items()}
    differing = sorted(
        (number, token) for token, number in teacher.ids.items() if tokens.get(number, token) != token
    )
    if differing:
        first, token = differing[0]
        return f"{len(differing)} ids differ: id {first} is {token!r} and {tokens[first]!r}"
    last = max(teacher.ids.values(), default=-1)
    sides = (("teacher", teacher, student), ("student", student, teacher))
    for role, owner, other in sides:
        unmatched = [
            (number, token)
            for token, number in owner.ids.items()
            if other.ids.get(token) != number
            and not (token not in other.ids and token in owner.added_tokens and other.may_add(token))
        ]
        if role == "student" and allows_appended:
            unmatched = [
                (number, token)
                for number, token in unmatched
                if number <= last or token not in owner.added_tokens
            ]
        if unmatched:
            first, token = min(unmatched)
            return f"the {role} alone has {len(unmatched)} of its tokens, such as {token!r} (id {first})"
    return _find_text_difference(teacher, student)


def _find_text_difference(teacher: TokenizerFiles, student: TokenizerFiles) -> str | None:
    """Return the first probe text that two tokenizers split differently; None without one, or if unknown."""
    if teacher.is_plain and student.is_plain:
        for text in PROBE_TEXTS:
            if teacher.encode(text) != student.encode(text):
                return f"they split {text!r} differently"
    return None
