"""95 % intervals of scores by the bootstrap over examples.

Examples are drawn with replacement. This covers the choice of examples, not the noise of training, which
several seeds cover. Equal numbers of examples get equal draws, so that cells that share prompts are paired.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gkd_lab.metrics.score import CorpusStatistics, MetricInput
from gkd_lab.metrics.text_metrics import METRICS

Floats = NDArray[np.float64]

RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)
_MAX_MATRIX_NUMBERS = 5_000_000
"""Largest matrix of draws or of means, in numbers: 40 MB."""
_ROUNDING_DECIMALS = 9
"""Finer digits differ between a cell alone and the same cell among others: sums in another order."""


def compute_interval(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    per_example: Sequence[float],
    *,
    samples_per_prompt: int = 1,
) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval (low, high) of a metric; None for a corpus score of samples.

    With several samples per prompt, one after another, the interval of a mean resamples prompts.
    """
    definition = METRICS[metric]
    if definition.compute_statistics is None:
        means = np.reshape(per_example, (-1, samples_per_prompt)).mean(axis=1)
        return bootstrap_mean_interval(means.tolist())
    if samples_per_prompt > 1:
        return None
    inputs = MetricInput(predictions, references)
    if definition.compute_interval is not None:
        return definition.compute_interval(inputs)
    return bootstrap_corpus_interval(definition.compute_statistics(inputs))


def bootstrap_corpus_interval(
    statistics: CorpusStatistics, *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return (low, high), the 2.5 and 97.5 percentiles of a corpus score over resampled examples."""
    counts = draw_resample_counts(len(statistics.per_example), resamples, seed=0)
    summed = (row for part in counts for row in (part @ statistics.per_example).tolist())
    low, high = np.percentile([statistics.compute_score(row) for row in summed], _PERCENTILES)
    return float(low), float(high)


def bootstrap_mean_interval(
    per_example: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return (low, high), the 2.5 and 97.5 percentiles of the mean over resampled examples.

    Raises ValueError without examples.
    """
    values = np.asarray(per_example, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"an interval needs one value per example, got an array of shape {values.shape}")
    low, high = bootstrap_mean_intervals(values[None], resamples=resamples, seed=seed)[0]
    return float(low), float(high)


def bootstrap_mean_intervals(per_example: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return the 95 % intervals of the means of M cells, (M, 2), from values (M, N), with equal draws."""
    values = np.asarray(per_example, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"intervals need values (cells, examples), got an array of shape {values.shape}")
    cells = max(1, _MAX_MATRIX_NUMBERS // resamples)
    return np.concatenate(
        [_compute_interval_ends(values[n : n + cells], resamples, seed) for n in range(0, len(values), cells)]
    )


def _compute_interval_ends(values: Floats, resamples: int, seed: int) -> Floats:
    """Return the 2.5 and 97.5 percentiles of each row's resampled mean, (M, 2), rounded."""
    examples = values.shape[1]
    # How often each example is drawn, times the examples' values, is the sum over a resample.
    means = [values @ counts.T / examples for counts in draw_resample_counts(examples, resamples, seed)]
    ends = np.percentile(np.concatenate(means, axis=1), _PERCENTILES, axis=1, overwrite_input=True)
    return np.round(ends.T, _ROUNDING_DECIMALS)


def draw_resample_counts(examples: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each example is drawn in each resample, as blocks of rows of (resamples, examples)."""
    rows = max(1, _MAX_MATRIX_NUMBERS // examples)
    for part, first in enumerate(range(0, resamples, rows)):
        yield _draw_count_matrix(examples, min(rows, resamples - first), seed, part)


@lru_cache(maxsize=4)
def _draw_count_matrix(examples: int, resamples: int, seed: int, part: int) -> Floats:
    """Return block `part` of `draw_resample_counts`, (resamples, examples); each row sums to `examples`."""
    generator = np.random.default_rng((seed, part))
    drawn = generator.integers(examples, size=(resamples, examples))
    drawn += np.arange(resamples)[:, None] * examples
    counts = np.bincount(drawn.ravel(), minlength=resamples * examples)
    return counts.reshape(resamples, examples).astype(np.float64)
