"""Power: which difference a number of seeds and examples shows, and how many seeds decide an open claim.

Two-sided tests at 5 % with 80 % power (Card et al. 2020), for paired differences whose noise is that of
`statistics.noise`: one part shrinks with the seeds, the other with the examples only. Powers are those of
the noncentral t, exact also for two seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gkd_lab.statistics.noise import EffectEstimate, compute_t_quantile

LEVEL = 0.025
POWER = 0.8
MAX_SEEDS = 200
"""Seeds beyond which more of them are no answer."""
MANY_DEGREES = 1e6
_NODES = 400
"""Quantiles of the estimated variance over which a power is averaged."""
_BISECTIONS = 40


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


def compute_detectable_difference(noise: Noise, seeds: int, level: float = LEVEL) -> float:
    """Return the least true difference in points that so many seeds show with a power of 80 %.

    level: share of errors on the side of the difference. Infinite for a single seed.
    """
    from scipy.special import nctdtrinc

    error = noise.compute_error(seeds)
    if seeds < 2:
        return math.inf
    if noise.example_variance == 0:
        return float(nctdtrinc(seeds - 1, 1 - POWER, compute_t_quantile(level, seeds - 1))) * error
    low, high = 0.0, error
    while compute_power(noise, seeds, high, level) < POWER:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        has_power = compute_power(noise, seeds, middle, level) >= POWER
        low, high = (low, middle) if has_power else (middle, high)
    return high


def compute_power(noise: Noise, seeds: int, difference: float, level: float = LEVEL) -> float:
    """Return the probability that so many seeds show a true difference in points; 0 for a single seed.

    With noise of examples: the interval of `statistics.noise`, averaged over the seeds' estimated variance;
    the examples are many.
    """
    from scipy.special import chdtri, nctdtr, ndtr

    error = noise.compute_error(seeds)
    if seeds < 2 or error == 0:
        return float(seeds >= 2 and difference > 0)
    quantile, shift = compute_t_quantile(level, seeds - 1), difference / error
    if noise.example_variance == 0:
        power = 1 - float(nctdtr(seeds - 1, shift, quantile))
        return power if math.isfinite(power) else float(shift > quantile)  # scipy: NaN at some shifts far off
    ratios = chdtri(seeds - 1, (np.arange(_NODES) + 0.5) / _NODES) / (seeds - 1)
    example_part = compute_t_quantile(level, MANY_DEGREES) ** 2 * noise.example_variance
    widths = np.sqrt(quantile**2 * noise.seed_variance / seeds * ratios + example_part)
    return float(ndtr(shift - widths / error).mean())


def find_least_seeds(has_power: Callable[[int], bool], first: int = 2) -> int | None:
    """Return the least number of seeds from `first` to 200 that has power, which more seeds have as well."""
    if first > MAX_SEEDS or not has_power(MAX_SEEDS):
        return None
    low, high = first - 1, MAX_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if has_power(middle) else (middle, high)
    return high


# ---- open claims ----


def estimate_required_seeds(
    estimates: Sequence[EffectEstimate], margins: Sequence[float], level: float = LEVEL
) -> int | None:
    """Return the number of seeds that would probably decide a claim, were its effects the true ones.

    The claim holds if all estimates are shown above minus their margins, and fails if one is shown below, at
    `level`. None: more than 200 seeds, or the noise is not known.
    """
    if any(estimate.standard_error is None or estimate.seeds < 2 for estimate in estimates):
        return None
    pairs = list(zip(estimates, margins, strict=True))

    def decides(seeds: int) -> bool:
        """Return whether so many seeds give a verdict in 80 %."""
        holds = math.prod(_compute_projected_power(e, margin, seeds, 1, LEVEL) for e, margin in pairs)
        fails = max(_compute_projected_power(e, margin, seeds, -1, level) for e, margin in pairs)
        return max(holds, fails) >= POWER

    return find_least_seeds(decides, min(estimate.seeds for estimate in estimates) + 1)


def _compute_projected_power(
    estimate: EffectEstimate, margin: float, seeds: int, sign: int, level: float
) -> float:
    """Return the power to show at so many seeds that the effect is above minus the margin (1) or below (-1).

    The bias that is left in an end of an extreme's interval shrinks as its error does.
    """
    noise = _scale_noise(estimate)
    now = noise.compute_error(estimate.seeds)
    if now == 0:
        return float(sign * (estimate.effect + margin) > 0)
    center = estimate.low_center if sign > 0 else estimate.high_center
    end = estimate.effect + (center - estimate.effect) * noise.compute_error(seeds) / now
    return compute_power(noise, seeds, sign * (end + margin), level)


def _scale_noise(estimate: EffectEstimate) -> Noise:
    """Return an estimate's variances, scaled to give its standard error: a floor or an extreme has more."""
    assert estimate.standard_error is not None
    estimated = Noise(estimate.seed_variance, estimate.example_variance)
    error = estimated.compute_error(estimate.seeds)
    if error == 0:  # no example differs: one may
        return Noise(0.0, estimate.standard_error**2)
    scale = (estimate.standard_error / error) ** 2
    return Noise(scale * estimated.seed_variance, scale * estimated.example_variance)


def needs_more_examples(estimate: EffectEstimate, margin: float = 0.0) -> bool:
    """Return whether more seeds leave an effect open that they would show on a test set without end."""
    if estimate.standard_error is None:
        return False
    noise, distance = Noise(estimate.seed_variance), abs(estimate.effect + margin)
    return estimate.example_variance > 0 and compute_power(noise, MAX_SEEDS, distance) >= POWER
