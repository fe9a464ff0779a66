"""Power: which difference a number of seeds and examples shows, and how many seeds decide an open one.

Two-sided tests at 5 % with 80 % power (Card et al. 2020), for paired differences whose noise is that of
`statistics.noise`: one part shrinks with the seeds, the other with the examples only.
"""

import math
from dataclasses import dataclass

from gkd_lab.statistics.noise import EffectEstimate, compute_t_quantile

LEVEL = 0.025
POWER = 0.8
MAX_SEEDS = 200
"""Seeds beyond which more of them are no answer."""


@dataclass(frozen=True)
class Noise:
    """Variances of a paired difference, in squared points."""

    seed_variance: float
    """Of one seed; a mean over S seeds has 1 / S of it."""
    example_variance: float = 0.0
    """Of the examples' choice; seeds do not reduce it."""

    def compute_error(self, seeds: int) -> float:
        """Return the standard error of a mean over so many seeds, in points."""
        return math.sqrt(self.seed_variance / seeds + self.example_variance)

    def compute_degrees(self, seeds: int) -> float:
        """Return Satterthwaite's degrees of freedom at so many seeds; the examples are many."""
        part = self.seed_variance / seeds
        return (seeds - 1) * ((part + self.example_variance) / part) ** 2 if part > 0 else math.inf


def compute_detectable_difference(noise: Noise, seeds: int, comparisons: int = 1) -> float:
    """Return the least true difference in points that so many seeds show with a power of 80 %.

    comparisons: number among which a test is Bonferroni-adjusted. Infinite for a single seed.
    """
    if seeds < 2:
        return math.inf
    degrees = min(noise.compute_degrees(seeds), 1e6)
    quantiles = compute_t_quantile(LEVEL / comparisons, degrees) + compute_t_quantile(1 - POWER, degrees)
    return quantiles * noise.compute_error(seeds)


def estimate_required_seeds(estimate: EffectEstimate, margin: float = 0.0) -> int | None:
    """Return the number of seeds that would probably decide a comparison, were its effect the true one.

    None: more seeds would not, as the effect is too small for the examples' noise or for 200 seeds, or the
    noise is not known.
    """
    if estimate.standard_error is None or estimate.seeds < 2:
        return None
    noise = Noise(estimate.seed_variance, estimate.example_variance)
    distance = abs(estimate.effect + margin)
    for seeds in range(estimate.seeds + 1, MAX_SEEDS + 1):
        if compute_detectable_difference(noise, seeds) <= distance:
            return seeds
    return None
