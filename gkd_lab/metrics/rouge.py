"""ROUGE F-measures of rouge_score, the implementation the T5 papers used.

Cells of a grid share references and often predictions, so a scorer remembers both for as long as it lives.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenizers

PAIRS_KEPT = 2**18
"""Pairs whose scores are remembered: about 100 MB with sentences of 20 words."""
TEXTS_KEPT = 2**14
"""Texts whose tokens are remembered: enough for the references of a cell to stay until the next one."""
WORDS_KEPT = 2**17


class _Stemmer:
    """Porter's, each word once."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=WORDS_KEPT)(PorterStemmer().stem)


class _Tokenizer(tokenizers.DefaultTokenizer):
    """rouge_score's own; equal texts once."""

    def __init__(self, use_stemmer: bool) -> None:
        super().__init__(use_stemmer=False)
        self._stemmer = _Stemmer() if use_stemmer else None
        self.tokenize = lru_cache(maxsize=TEXTS_KEPT)(super().tokenize)


class Rouge:
    """Scores pairs of texts by some of `rouge1`, `rouge2`, `rougeL` and `rougeLsum`.

    `rougeL` is over the whole text; `rougeLsum` takes each line for a sentence. Several references: the best.
    """

    def __init__(self, kinds: Sequence[str], *, use_stemmer: bool) -> None:
        self.kinds, self.use_stemmer = tuple(kinds), use_stemmer
        self._scorer = rouge_scorer.RougeScorer(list(kinds), tokenizer=_Tokenizer(use_stemmer))
        self._pair = lru_cache(maxsize=PAIRS_KEPT)(self._measured)

    def _measured(self, prediction: str, reference: str) -> tuple[float, ...]:
        scores: dict[str, Any] = self._scorer.score(reference, prediction)
        return tuple(100.0 * scores[kind].fmeasure for kind in self.kinds)

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, list[float]]:
        """Per kind the values of each example, 0 to 100."""
        values = [
            tuple(map(max, zip(*(self._pair(prediction, text) for text in texts), strict=True)))
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return {kind: [row[n] for row in values] for n, kind in enumerate(self.kinds)}

    def signature(self, kind: str) -> str:
        """Rule, settings and version."""
        split = "|split:lines" if kind == "rougeLsum" else ""
        stem = "yes" if self.use_stemmer else "no"
        return f"{kind}|measure:f|stem:{stem}|refs:best{split}|version:{version('rouge-score')}"
