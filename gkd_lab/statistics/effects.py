"""What a difference is worth: its mean, its interval, its p-value, and a verdict that may be `undecided`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gkd_lab.statistics.bootstrap import Array, compute_percentile_interval

Interval = tuple[float, float]

SCORE_TOLERANCE = 1e-6
"""Points by which a stored score and that of the stored texts may differ; beyond, a metric has changed."""


@dataclass(frozen=True)
class Effect:
    """A mean difference, its interval where there is one, and what was averaged."""

    mean: float
    low: float | None
    high: float | None
    pairs: int
    over: str
    p: float | None = None
    """Two-sided, for no difference; not adjusted for other comparisons."""

    @property
    def verdict(self) -> str:
        """`higher` or `lower` where the interval excludes 0, else `undecided`."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "higher" if self.low > 0 else "lower"


def estimate_seed_effect(differences: Sequence[float], pairs: int) -> Effect:
    """The effect from one mean difference a seed, at least two."""
    low, high = compute_t_interval(differences)
    error = float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    mean = float(np.mean(differences))
    over = f"{len(differences)} seeds, Student's t"
    return Effect(mean, low, high, pairs, over, compute_p_value(mean, error, len(differences)))


def estimate_bootstrap_effect(
    mean: float, resampled: Array, examples: int, pairs: int, method: str
) -> Effect:
    """The effect from its bootstrap distribution; of a single example nothing is decided."""
    if examples < 2:
        return Effect(mean, None, None, pairs, "one example, no interval")
    low, high = compute_percentile_interval(resampled)
    return Effect(mean, low, high, pairs, method, compute_p_value(mean, float(np.std(resampled)), examples))


def compute_p_value(mean: float, standard_error: float, count: int) -> float:
    """Two-sided p-value of a mean of `count` values with this standard error (Student's t)."""
    from scipy.special import stdtr

    if standard_error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(count - 1, -abs(mean) / standard_error))


def compute_t_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of at least two independent values (Student's t)."""
    from scipy.special import stdtrit

    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(stdtrit(len(values) - 1, 0.975)) * spread
    center = float(np.mean(values))
    return center - half, center + half
