"""95 % intervals for scores: how far a value would move with other examples of the same kind.

The bootstrap draws examples with replacement. It knows nothing of training noise: that is what
seeds are for. Equal numbers of examples get equal draws, so that cells that share prompts are paired.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gkd_lab.metrics.classifier_metric_names import CLASSIFICATION_METRICS
from gkd_lab.metrics.classifier_metrics import bootstrap_interval as classification_interval

CORPUS_METRICS = ("bleu", "chrf", *CLASSIFICATION_METRICS)
"""Scores of a whole corpus; the mean of their sentence scores is another number."""

Floats = NDArray[np.float64]

_MAX_MATRIX_NUMBERS = 5_000_000
"""Numbers held at once, of draws and of means: 40 MB."""
_ROUNDING_DECIMALS = 9
"""Finer digits differ between a cell alone and the same cell among others: sums in another order."""


def bootstrap_mean_interval(
    per_example: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the mean over resampled examples. ValueError for none."""
    values = np.asarray(per_example, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"an interval needs one value an example, got an array of {values.shape}")
    low, high = bootstrap_mean_intervals(values[None], resamples=resamples, seed=seed)[0]
    return float(low), float(high)


def bootstrap_mean_intervals(per_example: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Floats:
    """`mean_interval` of M cells at once: values (M, N) -> ends (M, 2).

    All cells see the same draws: how often each example was drawn, times the examples' values, is the sums.
    """
    values = np.asarray(per_example, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"intervals need values (cells, examples), got an array of {values.shape}")
    cells = max(1, _MAX_MATRIX_NUMBERS // resamples)
    return np.concatenate(
        [_compute_interval_ends(values[n : n + cells], resamples, seed) for n in range(0, len(values), cells)]
    )


def _compute_interval_ends(values: Floats, resamples: int, seed: int) -> Floats:
    means = [
        values @ counts.T / values.shape[1]
        for counts in draw_resample_counts(values.shape[1], resamples, seed)
    ]
    ends = np.percentile(np.concatenate(means, axis=1), [2.5, 97.5], axis=1, overwrite_input=True)
    return np.round(ends.T, _ROUNDING_DECIMALS)


def draw_resample_counts(examples: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each example is drawn in each resample, (resamples, examples), in parts; always the same."""
    rows = max(1, _MAX_MATRIX_NUMBERS // examples)
    for part, first in enumerate(range(0, resamples, rows)):
        yield _draw_count_matrix(examples, min(rows, resamples - first), seed, part)


@lru_cache(maxsize=4)
def _draw_count_matrix(examples: int, resamples: int, seed: int, part: int) -> Floats:
    """One part of `draws`: as many draws as examples a row."""
    generator = np.random.default_rng((seed, part))
    drawn = generator.integers(examples, size=(resamples, examples))
    drawn += np.arange(resamples)[:, None] * examples
    counts = np.bincount(drawn.ravel(), minlength=resamples * examples)
    return counts.reshape(resamples, examples).astype(np.float64)


def bootstrap_corpus_interval(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    resamples: int = 1000,
) -> tuple[float, float]:
    """sacreBLEU's own bootstrap for `bleu` and `chrf`, at sacreBLEU's defaults (13a; 6 characters).

    It resamples the sentences' sufficient statistics (seed 12345, or SACREBLEU_SEED) and publishes
    half the width of the middle 95 %: the interval is the score plus and minus that, in 0 to 100.
    """
    from gkd_lab.metrics.corpus import build_sacrebleu_metric, transpose_references

    scorer = build_sacrebleu_metric(metric)
    score = scorer.corpus_score(list(predictions), transpose_references(references), n_bootstrap=resamples)
    facts = json.loads(score.format(width=6, is_json=True, signature=str(scorer.get_signature())))
    half = float(facts.get("confidence_var", 0.0))  # left out where every resample scores 0
    return max(0.0, score.score - half), min(100.0, score.score + half)


def compute_interval(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    per_example: Sequence[float],
    *,
    samples_per_prompt: int = 1,
) -> tuple[float, float] | None:
    """Low and high end for a metric: of the corpus score where it is one, else of the mean.

    With several `samples` a prompt, one after another, prompts are drawn; a corpus score then has none.
    """
    if metric in CLASSIFICATION_METRICS:
        drawn = draw_resample_counts(len(predictions), 1000, 0)
        return (
            classification_interval(metric, predictions, references, drawn)
            if samples_per_prompt == 1
            else None
        )
    if metric in CORPUS_METRICS:
        return bootstrap_corpus_interval(metric, predictions, references) if samples_per_prompt == 1 else None
    return bootstrap_mean_interval(np.reshape(per_example, (-1, samples_per_prompt)).mean(axis=1).tolist())
