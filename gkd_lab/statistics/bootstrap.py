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
from gkd_lab.metrics.classifier_metrics import compute_statistics
from gkd_lab.metrics.intervals import CORPUS_METRICS, draw_resample_counts
from gkd_lab.store import Record
from gkd_lab.store.predictions import group_by_prompt

Array = NDArray[np.float64]
CorpusScore = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class ExampleStatistics:
    """One model's statistics under one metric, a row an example (N, K); a mean has one column."""

    statistics: Array
    corpus_score: CorpusScore | None = None
    """Score of summed statistics; None: the mean."""

    def __len__(self) -> int:
        return len(self.statistics)

    @property
    def score(self) -> float:
        """The score of the examples as they are, 0 to 100."""
        return float(self.score_resamples(np.ones((1, len(self))))[0])

    def score_resamples(self, counts: Array) -> Array:
        """(R,) scores of resamples in which example n is there counts[r, n] times."""
        summed = counts @ self.statistics
        if self.corpus_score is None:
            scores: Array = summed[:, 0] / len(self)
            return scores
        return np.array([self.corpus_score(row) for row in summed.tolist()])

    def select_examples(self, examples: Sequence[int]) -> "ExampleStatistics":
        """The sample of some of the examples, in the order given."""
        return ExampleStatistics(self.statistics[list(examples)], self.corpus_score)


def build_example_statistics(
    metric: str, rows: Sequence[Mapping[str, Any]], values: Sequence[float]
) -> ExampleStatistics:
    """Stored predictions with their value each as a sample of prompts, in their order.

    Several texts of one prompt are one example: they are not independent of each other.
    """
    groups = group_by_prompt(rows)
    if metric not in CORPUS_METRICS:
        return ExampleStatistics(np.array([[np.mean([values[n] for n in group])] for group in groups]))
    counted, score = _count_corpus_statistics(metric, rows)
    return ExampleStatistics(np.array([counted[group].sum(axis=0) for group in groups]), score)


def _count_corpus_statistics(metric: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Array, CorpusScore]:
    """Counts of each text (T, K), of BLEU and chrF sacreBLEU's at its defaults, and the score of such."""
    from gkd_lab.metrics.corpus import build_sacrebleu_metric, transpose_references

    if metric in CLASSIFICATION_METRICS:
        texts = [row["prediction"] for row in rows]
        return compute_statistics(metric, texts, [row["references"] for row in rows])

    scorer = build_sacrebleu_metric("bleu" if metric == "bleu" else "chrf")
    # What its own paired bootstrap resamples; that reports no interval of the difference.
    counted = scorer._extract_corpus_statistics(
        [row["prediction"] for row in rows], transpose_references([row["references"] for row in rows])
    )

    def corpus(row: Sequence[float]) -> float:
        return float(scorer._compute_score_from_stats(row).score)

    return np.asarray(counted, dtype=np.float64), corpus


def bootstrap_scores(samples: Sequence[ExampleStatistics], *, resamples: int = 1000, seed: int = 0) -> Array:
    """(S, R) scores of samples over the same N examples: column r draws the same ones for all."""
    examples = len(samples[0])
    assert examples and {len(sample) for sample in samples} == {examples}
    parts = [
        np.array([sample.score_resamples(counts) for sample in samples])
        for counts in draw_resample_counts(examples, resamples, seed)
    ]
    return np.concatenate(parts, axis=1)


def compute_percentile_interval(scores: Array) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles."""
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def load_example_statistics(
    record: Record, evaluation: AnyEvaluation, metric: str
) -> ExampleStatistics | None:
    """What was written for the evaluation, to be resampled; None where it was not kept."""
    rows = record.get_evaluation(evaluation).read_prediction_rows()
    values = [row.get("scores", {}).get(metric) for row in rows]
    return build_example_statistics(metric, rows, values) if rows and None not in values else None
