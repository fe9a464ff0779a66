"""sacreBLEU's corpus scores with their signatures, and sentence scores for each example.

A corpus score, the sentence scores and the bootstrap all need the n-grams of the same pairs of texts: here
each pair is counted once. All else is sacreBLEU's own code.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

MAX_CACHED_PAIRS = 2**16
"""Pairs whose counts are remembered: about 40 MB with sentences of 20 words."""


class _CachedBLEU(BLEU):
    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        return _extract_statistics("bleu", self, hypotheses, references)


class _CachedCHRF(CHRF):
    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        return _extract_statistics("chrf", self, hypotheses, references)

    def _compute_score_from_stats(self, stats: Any) -> Any:
        """A resample that scores 0 is a float, any other a numpy one, and `statistics` refuses the mix."""
        score = super()._compute_score_from_stats(stats)
        score.score = float(score.score)
        return score


def build_sacrebleu_metric(name: str, *, sentence_level: bool = False) -> Any:
    """sacreBLEU's `bleu` or `chrf` at its defaults; BLEU of sentences at the effective order, as it asks."""
    return _CachedCHRF() if name == "chrf" else _CachedBLEU(effective_order=sentence_level)


def transpose_references(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """One list per reference position, as sacreBLEU wants them; None where an example has fewer."""
    return list(map(list, zip_longest(*references)))  # sacreBLEU's types leave its None out


def _extract_statistics(
    name: str, metric: Any, hypotheses: Sequence[str], references: Any
) -> list[list[int]]:
    given = [tuple(text for text in texts if text is not None) for texts in zip(*references, strict=True)]
    sizes = set(map(len, given))
    metric.num_refs = sizes.pop() if len(sizes) == 1 else -1  # what its signature says
    return [list(_count_ngrams(name, text, texts)) for text, texts in zip(hypotheses, given, strict=True)]


@lru_cache(maxsize=MAX_CACHED_PAIRS)
def _count_ngrams(name: str, prediction: str, references: tuple[str, ...]) -> tuple[int, ...]:
    """What sacreBLEU sums over a corpus."""
    plain = CHRF() if name == "chrf" else BLEU()
    (counts,) = plain._extract_corpus_statistics([prediction], [[text] for text in references])
    return tuple(counts)


def score_corpus(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float], str]:
    """Corpus value, sentence values, signature (of the corpus value)."""
    corpus, sentence = build_sacrebleu_metric(name), build_sacrebleu_metric(name, sentence_level=True)
    value = corpus.corpus_score(list(predictions), transpose_references(references)).score
    per_example = [
        sentence.sentence_score(prediction, list(texts)).score
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return value, per_example, f"{name}|{corpus.get_signature()}"
