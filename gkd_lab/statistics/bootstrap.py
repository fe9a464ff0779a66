"""The bootstrap over examples: how often each is drawn, times what it counts for the score.

An example is a prompt. A mean counts its values; BLEU and chrF count n-grams, from which sacreBLEU
computes the corpus score of a resample. Samples that share their draws are paired: what makes an example
hard for one model and for the other cancels in their difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.metrics.classifier_metric_names import CLASSIFICATION_METRICS
from gkd_lab.metrics.classifier_metrics import statistics
from gkd_lab.metrics.intervals import CORPUS_METRICS, draws
from gkd_lab.store import Record
from gkd_lab.store.predictions import by_prompt

Array = NDArray[np.float64]
Corpus = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Sample:
    """One model's statistics under one metric, a row an example (N, K); a mean has one column."""

    statistics: Array
    corpus: Corpus | None = None
    """Score of summed statistics; None: the mean."""

    def __len__(self) -> int:
        return len(self.statistics)

    @property
    def value(self) -> float:
        """The score of the examples as they are, 0 to 100."""
        return float(self.scores(np.ones((1, len(self))))[0])

    def scores(self, counts: Array) -> Array:
        """(R,) scores of resamples in which example n is there counts[r, n] times."""
        summed = counts @ self.statistics
        if self.corpus is None:
            scores: Array = summed[:, 0] / len(self)
            return scores
        return np.array([self.corpus(row) for row in summed.tolist()])

    def take(self, examples: Sequence[int]) -> "Sample":
        """The sample of some of the examples, in the order given."""
        return Sample(self.statistics[list(examples)], self.corpus)


def sample_of(metric: str, rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Sample:
    """Stored predictions with their value each as a sample of prompts, in their order.

    Several texts of one prompt are one example: they are not independent of each other.
    """
    groups = by_prompt(rows)
    if metric not in CORPUS_METRICS:
        return Sample(np.array([[np.mean([values[n] for n in group])] for group in groups]))
    counted, score = _counted(metric, rows)
    return Sample(np.array([counted[group].sum(axis=0) for group in groups]), score)


def _counted(metric: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Array, Corpus]:
    """Counts of each text (T, K), of BLEU and chrF sacreBLEU's at its defaults, and the score of such."""
    from gkd_lab.metrics.corpus import measure, streams

    if metric in CLASSIFICATION_METRICS:
        texts = [row["prediction"] for row in rows]
        return statistics(metric, texts, [row["references"] for row in rows])

    scorer = measure("bleu" if metric == "bleu" else "chrf")
    # What its own paired bootstrap resamples; that reports no interval of the difference.
    counted = scorer._extract_corpus_statistics(
        [row["prediction"] for row in rows], streams([row["references"] for row in rows])
    )

    def corpus(row: Sequence[float]) -> float:
        return float(scorer._compute_score_from_stats(row).score)

    return np.asarray(counted, dtype=np.float64), corpus


def bootstrap(samples: Sequence[Sample], *, resamples: int = 1000, seed: int = 0) -> Array:
    """(S, R) scores of samples over the same N examples: column r draws the same ones for all."""
    examples = len(samples[0])
    assert examples and {len(sample) for sample in samples} == {examples}
    parts = [
        np.array([sample.scores(counts) for sample in samples]) for counts in draws(examples, resamples, seed)
    ]
    return np.concatenate(parts, axis=1)


def middle(scores: Array) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles."""
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def recorded_sample(record: Record, evaluation: AnyEvaluation, metric: str) -> Sample | None:
    """What was written for the evaluation, to be resampled; None where it was not kept."""
    rows = record.evaluation(evaluation).predictions()
    values = [row.get("scores", {}).get(metric) for row in rows]
    return sample_of(metric, rows, values) if rows and None not in values else None
