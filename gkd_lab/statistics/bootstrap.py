"""Bootstrap over examples, from sufficient statistics of each example.

Models that share their resamples are paired: difficult examples are difficult for both and cancel in the
difference.
"""

from collections.abc import Sequence

import numpy as np

from gkd_lab.metrics.intervals import draw_resample_counts
from gkd_lab.tables.example_statistics import Array, ExampleStatistics


def bootstrap_scores(models: Sequence[ExampleStatistics], *, resamples: int = 1000, seed: int = 0) -> Array:
    """Return (S, R) bootstrap scores of S models over the same N examples, equal resamples for all."""
    examples = len(models[0])
    assert examples and {len(model) for model in models} == {examples}
    parts = [
        np.array([model.score_resamples(counts) for model in models])
        for counts in draw_resample_counts(examples, resamples, seed)
    ]
    return np.concatenate(parts, axis=1)


def compute_percentile_interval(scores: Array) -> tuple[float, float]:
    """Return (2.5th percentile, 97.5th percentile), a 95 % bootstrap interval."""
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
