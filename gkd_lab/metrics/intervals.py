"""95 % intervals for scores: how far a value would move with other examples of the same kind.

The bootstrap draws examples with replacement. It knows nothing of training noise: that is what
seeds are for.
"""

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

CORPUS_METRICS = ("bleu", "chrf")
"""Scores of a whole corpus; the mean of their sentence scores is another number."""

_DRAWN_AT_ONCE = 2_000_000


def mean_interval(
    per_example: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the mean over resampled examples. ValueError for none."""
    values = np.asarray(per_example, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"an interval needs one value an example, got an array of {values.shape}")
    generator = np.random.default_rng(seed)
    chunk = max(1, _DRAWN_AT_ONCE // values.size)
    means = [
        values[generator.integers(values.size, size=(min(chunk, resamples - done), values.size))].mean(axis=1)
        for done in range(0, resamples, chunk)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def corpus_interval(
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
    from sacrebleu.metrics import BLEU, CHRF

    class PlainChrf(CHRF):
        """A resample that scores 0 is a float, any other a numpy one, and `statistics` refuses the mix."""

        def _compute_score_from_stats(self, stats: Any) -> Any:
            score = super()._compute_score_from_stats(stats)
            score.score = float(score.score)
            return score

    scorer = {"bleu": BLEU, "chrf": PlainChrf}[metric]()
    streams = [list(stream) for stream in zip_longest(*references)]
    score = scorer.corpus_score(list(predictions), streams, n_bootstrap=resamples)
    facts = json.loads(score.format(width=6, is_json=True, signature=str(scorer.get_signature())))
    half = float(facts.get("confidence_var", 0.0))  # left out where every resample scores 0
    return max(0.0, score.score - half), min(100.0, score.score + half)


def interval(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    per_example: Sequence[float],
) -> tuple[float, float]:
    """Low and high end for a metric: of the corpus score where it is one, else of the mean."""
    if metric in CORPUS_METRICS:
        return corpus_interval(metric, predictions, references)
    return mean_interval(per_example)
