"""BLEU and chrF by sacreBLEU: corpus scores with signatures, sentence scores, statistics and intervals.

All of them need the n-grams of the same pairs of texts, so each pair is counted once and cached. Everything
else is sacreBLEU's own code.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from gkd_lab.metrics.score import CorpusStatistics, MetricInput, References, Score
from gkd_lab.metrics.scripts import warn_of_missing_spaces

MAX_CACHED_PAIRS = 2**16
"""About 40 MB with sentences of 20 words."""


class _CachedBLEU(BLEU):
    """BLEU that counts the n-grams of each pair of texts once."""

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        """Return the cached n-gram counts of each hypothesis; also set `num_refs` of the signature."""
        return _extract_statistics("bleu", self, hypotheses, references)


class _CachedCHRF(CHRF):
    """chrF that counts the n-grams of each pair of texts once."""

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        """Return the cached n-gram counts of each hypothesis; also set `num_refs` of the signature."""
        return _extract_statistics("chrf", self, hypotheses, references)

    def _compute_score_from_stats(self, stats: Any) -> Any:
        """Return chrF with a plain float `score`: sacreBLEU mixes numpy's in, which `statistics` refuses."""
        score = super()._compute_score_from_stats(stats)
        score.score = float(score.score)
        return score


def build_sacrebleu_metric(name: str, *, sentence_level: bool = False) -> Any:
    """Return sacreBLEU's object for `bleu` or `chrf`, default settings; sentence BLEU: effective order."""
    assert name in ("bleu", "chrf"), name
    return _CachedCHRF() if name == "chrf" else _CachedBLEU(effective_order=sentence_level)


def transpose_references(references: References) -> list[list[str]]:
    """Return one list per reference position, as sacreBLEU takes them; None where an example has fewer."""
    return list(map(list, zip_longest(*references)))  # sacreBLEU's types leave its None out


def _extract_statistics(
    name: str, metric: Any, hypotheses: Sequence[str], references: Any
) -> list[list[int]]:
    """Return the n-gram counts of each hypothesis; also set `metric.num_refs` (-1 if it varies)."""
    texts_per_example = [
        tuple(text for text in texts if text is not None) for texts in zip(*references, strict=True)
    ]
    sizes = set(map(len, texts_per_example))
    metric.num_refs = sizes.pop() if len(sizes) == 1 else -1
    return [
        list(_count_ngrams(name, hypothesis, texts))
        for hypothesis, texts in zip(hypotheses, texts_per_example, strict=True)
    ]


@lru_cache(maxsize=MAX_CACHED_PAIRS)
def _count_ngrams(name: str, prediction: str, references: tuple[str, ...]) -> tuple[int, ...]:
    """Return the n-gram counts of one example, which sacreBLEU sums over a corpus; cached."""
    metric = CHRF() if name == "chrf" else BLEU()
    (counts,) = metric._extract_corpus_statistics([prediction], [[text] for text in references])
    return tuple(counts)


def score_corpus(name: str, inputs: MetricInput) -> Score:
    """Return the corpus BLEU or chrF, 0 to 100, as a Score; `per_example` holds sentence scores.

    Warns of BLEU of texts without spaces between words.
    """
    if name == "bleu":
        warn_of_missing_spaces(name, (text for texts in inputs.references for text in texts))
    corpus, sentence = build_sacrebleu_metric(name), build_sacrebleu_metric(name, sentence_level=True)
    value = corpus.corpus_score(list(inputs.predictions), transpose_references(inputs.references)).score
    per_example = [
        sentence.sentence_score(prediction, list(texts)).score
        for prediction, texts in zip(inputs.predictions, inputs.references, strict=True)
    ]
    return Score(value, per_example, f"{name}|{corpus.get_signature()}")


def compute_corpus_statistics(name: str, inputs: MetricInput) -> CorpusStatistics:
    """Return the n-gram counts of each example and the function from their sum to the corpus score."""
    metric = build_sacrebleu_metric(name)
    counts = metric._extract_corpus_statistics(inputs.predictions, transpose_references(inputs.references))

    def compute_score(summed: Sequence[float]) -> float:
        """Return the corpus score, 0 to 100, of counts summed over examples."""
        return float(metric._compute_score_from_stats(summed).score)

    return CorpusStatistics(np.asarray(counts, dtype=np.float64), compute_score)


def bootstrap_sacrebleu_interval(
    name: str, inputs: MetricInput, *, resamples: int = 1000
) -> tuple[float, float]:
    """Return (low, high), sacreBLEU's own 95 % bootstrap interval of `bleu` or `chrf` over examples.

    It resamples the sentences' statistics (seed 12345, or SACREBLEU_SEED) and publishes half the width of the
    middle 95 %: the interval is the score plus and minus that. Settings are the defaults (13a; 6 characters).
    """
    metric = build_sacrebleu_metric(name)
    references = transpose_references(inputs.references)
    score = metric.corpus_score(list(inputs.predictions), references, n_bootstrap=resamples)
    fields = json.loads(score.format(width=6, is_json=True, signature=str(metric.get_signature())))
    half = float(fields.get("confidence_var", 0.0))  # left out where every resample scores 0
    return max(0.0, score.score - half), min(100.0, score.score + half)
