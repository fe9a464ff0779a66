"""ROUGE F-measures by rouge_score, the implementation that the T5 papers used.

Its words are of a-z and 0-9 alone: equal texts in Chinese have ROUGE 0, and German words that differ in an
umlaut have 100. With `words="unicode"` they are words of any script.
Cells of a grid share references and often predictions, so a scorer caches the results of both.
"""

import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Literal

from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenizers

from gkd_lab.metrics.scripts import SCRIPTS_WITHOUT_SPACES

MAX_CACHED_PAIRS = 2**18
"""About 100 MB with sentences of 20 words."""
MAX_CACHED_TEXTS = 2**14
"""Enough for the references of a cell to stay cached until the next cell."""
MAX_CACHED_WORDS = 2**17
WordKind = Literal["ascii", "unicode"]
_UNSPACED = SCRIPTS_WITHOUT_SPACES + "\uf900-\ufaff"  # and Han of old encodings
_UNICODE_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
"""A character of such a script, or letters and digits of another one."""
_LOST_SHARE = 0.5
"""Share of the letters and digits of the references that may be lost without a warning."""


class _CachedStemmer:
    """Porter stemmer that stems each word once."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=MAX_CACHED_WORDS)(PorterStemmer().stem)


class _CachedTokenizer(tokenizers.DefaultTokenizer):
    """Tokenizer of rouge_score that splits each text once."""

    def __init__(self, use_stemmer: bool) -> None:
        super().__init__(use_stemmer=False)
        self._stemmer = _CachedStemmer() if use_stemmer else None
        self.tokenize = lru_cache(maxsize=MAX_CACHED_TEXTS)(super().tokenize)


class _UnicodeTokenizer(tokenizers.Tokenizer):
    """Tokenizer of words of any script, in lower case, that splits each text once."""

    def __init__(self) -> None:
        self._split = lru_cache(maxsize=MAX_CACHED_TEXTS)(_split_unicode_words)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return self._split(text)


def _split_unicode_words(text: str) -> list[str]:
    """Return the words of a text of any script, in lower case."""
    words: list[str] = _UNICODE_WORD.findall(unicodedata.normalize("NFC", text).lower())
    return words


class RougeScorer:
    """Scores pairs of texts by some of `rouge1`, `rouge2`, `rougeL` and `rougeLsum`.

    `rougeL` is over the whole text; `rougeLsum` takes each line as a sentence. Of several references the one
    with the best score counts. words: `ascii`, rouge_score's own, or `unicode`, which are not stemmed.
    """

    def __init__(
        self, variants: Sequence[str], *, use_stemmer: bool = False, words: WordKind = "ascii"
    ) -> None:
        self.variants, self.use_stemmer, self.words = tuple(variants), use_stemmer, words
        tokenizer = _CachedTokenizer(use_stemmer) if words == "ascii" else _UnicodeTokenizer()
        self._scorer = rouge_scorer.RougeScorer(list(variants), tokenizer=tokenizer)
        self._score_cached_pair = lru_cache(maxsize=MAX_CACHED_PAIRS)(self._score_pair)

    def _score_pair(self, prediction: str, reference: str) -> tuple[float, ...]:
        """Return the F-measures of one text pair, 0 to 100, one per variant in the order of `variants`."""
        scores: dict[str, Any] = self._scorer.score(reference, prediction)
        return tuple(100.0 * scores[variant].fmeasure for variant in self.variants)

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, list[float]]:
        """Return for each variant the F-measure of each example, 0 to 100.

        Warns where `ascii` words leave out most of the references.
        """
        if self.words == "ascii" and _loses_most(text for texts in references for text in texts):
            warnings.warn(
                "ROUGE reads a-z and 0-9 alone, and most letters of these references are others: their score "
                f"says little; use {self.variants[0]}_unicode and the like",
                stacklevel=2,
            )
        values = [
            tuple(map(max, zip(*(self._score_cached_pair(prediction, text) for text in texts), strict=True)))
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return {variant: [row[n] for row in values] for n, variant in enumerate(self.variants)}

    def format_signature(self, variant: str) -> str:
        """Return the variant, its settings and the version of rouge_score as one text joined by `|`."""
        split = "|split:lines" if variant == "rougeLsum" else ""
        stem = "yes" if self.use_stemmer else "no"
        words = "" if self.words == "ascii" else f"|words:{self.words}"
        return f"{variant}|measure:f|stem:{stem}{words}|refs:best{split}|version:{version('rouge-score')}"


def _loses_most(texts: Iterable[str]) -> bool:
    """Return whether most letters and digits of the texts are not of a-z and 0-9 (in lower case)."""
    n_letters = n_lost = 0
    for text in texts:
        letters = [character for character in text.lower() if character.isalnum()]
        n_letters += len(letters)
        n_lost += sum(not character.isascii() for character in letters)
    return n_lost > _LOST_SHARE * n_letters
