"""Per-example scores and sufficient statistics of one model's stored predictions.

An example is a prompt. A mean needs its value; BLEU and chrF need its n-gram counts, from which sacreBLEU
computes the corpus score of any sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.metrics import METRICS, MetricInput
from gkd_lab.store import Record
from gkd_lab.store.predictions import group_by_prompt

Array = NDArray[np.float64]
CorpusScore = Callable[[Sequence[float]], float]

SCORE_TOLERANCE = 1e-6
"""Largest difference in points between a stored score and that of the stored texts; beyond it the metric
has changed."""


@dataclass(frozen=True)
class ExampleStatistics:
    """Statistics of one model's examples under one metric, (N, K); K is 1 for a mean."""

    statistics: Array
    corpus_score: CorpusScore | None = None
    """Score of summed statistics; None: the mean."""

    def __len__(self) -> int:
        return len(self.statistics)

    @property
    def score(self) -> float:
        """Score of all examples, each counted once, from 0 to 100."""
        if self.corpus_score is None:
            return float(self.statistics[:, 0].mean())
        return float(self.corpus_score(self.statistics.sum(axis=0).tolist()))

    def select_examples(self, examples: Sequence[int]) -> "ExampleStatistics":
        """Return the statistics of the examples at these indices, in the given order."""
        return ExampleStatistics(self.statistics[list(examples)], self.corpus_score)


def build_example_statistics(
    metric: str, rows: Sequence[Mapping[str, Any]], values: Sequence[float]
) -> ExampleStatistics:
    """Build statistics with one example per prompt, from rows and the score of each row.

    Several texts of one prompt are one example, because they are not independent: scores are averaged, and
    the sufficient statistics of corpus metrics such as BLEU are summed.
    """
    groups = group_by_prompt(rows)
    definition = METRICS.get(metric)  # None: a metric of lm-eval, a mean over documents
    if definition is None or definition.compute_statistics is None:
        return ExampleStatistics(np.array([[np.mean([values[n] for n in group])] for group in groups]))
    inputs = MetricInput([row["prediction"] for row in rows], [row["references"] for row in rows])
    corpus = definition.compute_statistics(inputs)
    summed = np.array([corpus.per_example[group].sum(axis=0) for group in groups])
    return ExampleStatistics(summed, corpus.compute_score)


def compute_pseudo_values(statistics: ExampleStatistics) -> Array:
    """Return one value per example, (N,), whose mean is the score of all of them.

    For a mean these are the examples' scores. For a corpus score S of the summed statistics t they are
    S(t) + N grad S(t) . (t_i - mean t), whose variance over N estimates that of S (infinitesimal jackknife,
    Efron 1982). The gradient is a central difference over the size of one example.
    """
    values, score = statistics.statistics, statistics.corpus_score
    if score is None:
        return values[:, 0]
    total, steps = values.sum(axis=0), _choose_steps(values)
    gradient = np.zeros(len(total))
    for number in np.flatnonzero(steps):
        shift = np.zeros(len(total))
        shift[number] = steps[number]
        ends = [score((total + sign * shift).tolist()) for sign in (1, -1)]
        gradient[number] = (ends[0] - ends[1]) / (2 * steps[number])
    pseudo_values: Array = score(total.tolist()) + len(values) * (values - values.mean(axis=0)) @ gradient
    return pseudo_values


def _choose_steps(values: Array) -> Array:
    """Return the step of each statistic, (K,): its mean size in an example, rounded up for counts.

    sacreBLEU truncates lengths to whole numbers. 0 for a statistic that is 0 in all examples.
    """
    sizes: Array = np.abs(values).mean(axis=0)
    is_count = (values == np.round(values)).all()
    return np.ceil(sizes) if is_count else sizes


def load_example_statistics(
    record: Record, evaluation: AnyEvaluation, metric: str
) -> ExampleStatistics | None:
    """Load a stored evaluation's statistics for a metric; None if a row lacks its score, or no rows."""
    rows = record.get_evaluation(evaluation).read_prediction_rows()
    values = [row.get("scores", {}).get(metric) for row in rows]
    return build_example_statistics(metric, rows, values) if rows and None not in values else None
