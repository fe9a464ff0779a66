"""The first sentence of a description, which `gkd-lab list` shows as an experiment's question."""

import re

_ABBREVIATIONS = {
    *(
        "al",
        "app",
        "approx",
        "cf",
        "ch",
        "e.g",
        "eq",
        "eqs",
        "etc",
        "fig",
        "figs",
        "i.e",
        "incl",
        "no",
        "nos",
    ),
    *("p", "pp", "resp", "sec", "sect", "tab", "vs", "vol"),
}
"""Words after whose full stop a sentence goes on, without that stop."""
_END = re.compile(r"(?P<word>[\w.]*)[.!?][\"'\u201d\u2019)\]]*(?=\s+[^\sa-z]|\s*$)")
"""A stop that may end a sentence, with the word before it: what follows is no small letter, or the end."""
_OPENING, _CLOSING = "([", ")]"


def extract_first_sentence(text: str) -> str:
    """Return the first sentence of a text in one line, without its full stop.

    Stops inside brackets, after an abbreviation (`et al.`, `e.g.`, `Fig.`) or an initial (`G. Hinton`), and
    before a small letter end none.
    """
    line = " ".join(text.split())
    for stop in _END.finditer(line):
        word = stop["word"]
        depth = _count_open_brackets(line[: stop.end()])
        is_initial = len(word) == 1 and word.isupper()
        if depth == 0 and word.lower() not in _ABBREVIATIONS and not is_initial:
            return line[: stop.end()].removesuffix(".")
    return line


def _count_open_brackets(text: str) -> int:
    """Return how many brackets of a text are still open."""
    return sum(character in _OPENING for character in text) - sum(character in _CLOSING for character in text)
