"""Effects: mean differences with their interval, p-value and verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gkd_lab.statistics.bootstrap import bootstrap_scores, compute_percentile_interval
from gkd_lab.tables.example_statistics import SCORE_TOLERANCE, Array, ExampleStatistics

Interval = tuple[float, float]


@dataclass(frozen=True)
class Effect:
    """A mean difference with its interval, where it has one."""

    mean: float
    low: float | None
    high: float | None
    pairs: int
    """Number of pairs averaged."""
    over: str
    """What the interval is taken over."""
    p: float | None = None
    """Two-sided p-value of no difference, not adjusted for other comparisons."""

    @property
    def verdict(self) -> str:
        """`higher` or `lower` if the interval excludes 0; `undecided` if not, or without interval."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "higher" if self.low > 0 else "lower"


def estimate_seed_effect(differences: Sequence[float], pairs: int) -> Effect:
    """Return mean, 95 % t interval and p-value of one difference per seed, for two seeds or more.

    `pairs` is stored as it is.
    """
    low, high = compute_t_interval(differences)
    mean = float(np.mean(differences))
    standard_error = float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    p = compute_p_value(mean, standard_error, len(differences))
    return Effect(mean, low, high, pairs, f"{len(differences)} seeds, Student's t", p)


def estimate_bootstrap_effect(
    mean: float, resampled: Array, examples: int, pairs: int, method: str
) -> Effect:
    """Return an effect of the given `mean`, with 95 % interval and p of its (R,) bootstrap values.

    With fewer than two examples it has neither. `method` says what the interval is taken over.
    """
    if examples < 2:
        return Effect(mean, None, None, pairs, "one example, no interval")
    low, high = compute_percentile_interval(resampled)
    p = compute_p_value(mean, float(np.std(resampled)), examples)
    return Effect(mean, low, high, pairs, method, p)


def estimate_one_seed_effect(
    mean: float, before: Sequence[ExampleStatistics | None], after: Sequence[ExampleStatistics | None]
) -> Effect:
    """Return an effect of the given `mean`, after minus before, with a bootstrap paired by example.

    It has no interval where statistics are missing, differ in length or do not give the stored scores.
    """
    statistics = [model for model in (*before, *after) if model is not None]
    unknown = Effect(mean, None, None, len(before), "one seed, no interval")
    if len(statistics) < len(before) + len(after) or len({len(model) for model in statistics}) > 1:
        return unknown
    low, high = np.split(np.array([model.score for model in statistics]), 2)
    if abs(float(high.mean() - low.mean()) - mean) > SCORE_TOLERANCE:
        return unknown
    low, high = np.split(bootstrap_scores(statistics), 2)
    resampled = (high - low).mean(axis=0)
    method = "one seed, paired bootstrap over examples"
    return estimate_bootstrap_effect(mean, resampled, len(statistics[0]), len(before), method)


def compute_p_value(mean: float, standard_error: float, count: int) -> float:
    """Return the two-sided p-value of mean = 0 by Student's t with `count` - 1 degrees of freedom."""
    from scipy.special import stdtr

    if standard_error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(count - 1, -abs(mean) / standard_error))


def compute_t_interval(values: Sequence[float]) -> Interval:
    """Return (low, high), the 95 % t interval of the mean of at least two independent values."""
    from scipy.special import stdtrit

    center = float(np.mean(values))
    standard_error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half_width = float(stdtrit(len(values) - 1, 0.975)) * standard_error
    return center - half_width, center + half_width
