"""ROUGE F-measures by rouge_score, the implementation that the T5 papers used.

Cells of a grid share references and often predictions, so a scorer caches the results of both.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenizers

MAX_CACHED_PAIRS = 2**18
"""About 100 MB with sentences of 20 words."""
MAX_CACHED_TEXTS = 2**14
"""Enough for the references of a cell to stay cached until the next cell."""
MAX_CACHED_WORDS = 2**17


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


class RougeScorer:
    """Scores pairs of texts by some of `rouge1`, `rouge2`, `rougeL` and `rougeLsum`.

    `rougeL` is over the whole text; `rougeLsum` takes each line as a sentence. Of several references the one
    with the best score counts.
    """

    def __init__(self, variants: Sequence[str], *, use_stemmer: bool) -> None:
        self.variants, self.use_stemmer = tuple(variants), use_stemmer
        self._scorer = rouge_scorer.RougeScorer(list(variants), tokenizer=_CachedTokenizer(use_stemmer))
        self._score_cached_pair = lru_cache(maxsize=MAX_CACHED_PAIRS)(self._score_pair)

    def _score_pair(self, prediction: str, reference: str) -> tuple[float, ...]:
        """Return the F-measures of one text pair, 0 to 100, one per variant in the order of `variants`."""
        scores: dict[str, Any] = self._scorer.score(reference, prediction)
        return tuple(100.0 * scores[variant].fmeasure for variant in self.variants)

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, list[float]]:
        """Return for each variant the F-measure of each example, 0 to 100."""
        values = [
            tuple(map(max, zip(*(self._score_cached_pair(prediction, text) for text in texts), strict=True)))
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return {variant: [row[n] for row in values] for n, variant in enumerate(self.variants)}

    def format_signature(self, variant: str) -> str:
        """Return the variant, its settings and the version of rouge_score as one text joined by `|`."""
        split = "|split:lines" if variant == "rougeLsum" else ""
        stem = "yes" if self.use_stemmer else "no"
        return f"{variant}|measure:f|stem:{stem}|refs:best{split}|version:{version('rouge-score')}"
