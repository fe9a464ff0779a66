"""Power of planned comparisons, by simulating scores of M models with known noise under S seeds.

Comparisons share models, so that powers of several come from joint draws. A largest score of several has no
exact power: its interval is estimated on each draw, as it will be on the run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gkd_lab.statistics.noise import (
    MIN_SEEDS_EXTREME,
    Array,
    EffectEstimate,
    ExtremePart,
    ScoreSample,
    estimate_extreme,
    evaluate_extreme,
)
from gkd_lab.statistics.power import (
    LEVEL,
    MANY_DEGREES,
    POWER,
    Noise,
    compute_detectable_difference,
)

_VALUES = 600_000
"""Simulated differences of linear comparisons: draws x seeds x comparisons."""
_MAX_DRAWS, _MIN_DRAWS = 20_000, 400
_EXTREME_DRAWS = 150
_EXTREME_EXAMPLES = 40
"""Simulated examples of each score: the mean over them has the noise of the planned number."""
_SEARCH_STEPS = 5
_WIDEST_FACTOR = 2.0**20


@dataclass(frozen=True)
class ModelNoise:
    """Standard deviations of the scores of M models, in points, each (M,)."""

    seed: Array
    """Between seeds; 0 for a model that all seeds share."""
    shared: Array
    """Of what all models of a seed share."""
    example: Array
    """Of a mean over the planned examples, equal in all seeds; 0 where it is not known."""


@dataclass(frozen=True)
class PlannedContrast:
    """A comparison of M models: a sum of largest contrasts that a claim says is above minus its margin."""

    parts: tuple[ExtremePart, ...]
    margin: float = 0.0

    @property
    def is_linear(self) -> bool:
        """Whether it is one weighted sum."""
        return all(len(part.matrix) == 1 for part in self.parts)

    @property
    def weights(self) -> Array:
        """(M,) weights of the sum; of an extreme, those of its first choice."""
        weights: Array = np.sum([part.sign * part.matrix[0] for part in self.parts], axis=0)
        return weights

    def reverse(self) -> "PlannedContrast":
        """Return the negative of the comparison."""
        return PlannedContrast(tuple(ExtremePart(-part.sign, part.matrix) for part in self.parts))

    def compute_noise(self, noise: ModelNoise) -> Noise:
        """Return the variances of the weighted sum."""
        separate = float(((self.weights * noise.seed) ** 2).sum())
        shared = float(self.weights @ noise.shared) ** 2
        return Noise(separate + shared, float(((self.weights * noise.example) ** 2).sum()))


def find_min_seeds(contrasts: Sequence[PlannedContrast]) -> int:
    """Return the seeds below which the comparisons get no verdict."""
    return 2 if all(contrast.is_linear for contrast in contrasts) else MIN_SEEDS_EXTREME


def find_holding_difference(
    contrasts: Sequence[PlannedContrast], noise: ModelNoise, seeds: int
) -> float | None:
    """Return the least difference in points at which all comparisons are shown above minus their margins.

    It is the true value of every comparison, found with a power of 80 %. None with too few seeds, or where
    no pattern of scores gives all comparisons one value.
    """
    if seeds < find_min_seeds(contrasts):
        return None
    if all(contrast.is_linear for contrast in contrasts):
        return float(np.quantile(_simulate_shown_differences(contrasts, noise, seeds), POWER))
    return _search_difference(contrasts, noise, seeds, LEVEL)


def find_failing_difference(
    contrasts: Sequence[PlannedContrast], noise: ModelNoise, seeds: int
) -> float | None:
    """Return the true value in points, below 0, of one comparison that makes a claim fail in 80 %.

    It is shown below minus its margin at its share of the level; of the comparison with most noise. None
    with too few seeds.
    """
    level = LEVEL / len(contrasts)
    if seeds < find_min_seeds(contrasts):
        return None
    limits = [
        c.margin + compute_detectable_difference(c.compute_noise(noise), seeds, level) for c in contrasts
    ]
    worst = contrasts[int(np.argmax(limits))]
    if worst.is_linear:
        return -max(limits)
    reversed_difference = _search_difference([worst.reverse()], noise, seeds, level)
    return None if reversed_difference is None else -reversed_difference


def shows_difference(
    contrasts: Sequence[PlannedContrast], noise: ModelNoise, seeds: int, difference: float
) -> bool:
    """Return whether a claim whose comparisons all have this true value in points gets its verdict in 80 %.

    The claim holds at a value above minus its margins, else it fails: one comparison is enough for that.
    """
    if seeds < find_min_seeds(contrasts):
        return False
    if difference <= -max(contrast.margin for contrast in contrasts):
        failing_difference = find_failing_difference(contrasts, noise, seeds)
        return failing_difference is not None and difference <= failing_difference
    if all(contrast.is_linear for contrast in contrasts):
        return float(np.mean(_simulate_shown_differences(contrasts, noise, seeds) <= difference)) >= POWER
    pattern = _build_joint_pattern(contrasts)
    return pattern is not None and _is_shown(contrasts, noise, seeds, difference * pattern, LEVEL)


# ---- weighted sums ----


def _simulate_shown_differences(contrasts: Sequence[PlannedContrast], noise: ModelNoise, seeds: int) -> Array:
    """Return the (R,) least true values at which each draw shows all weighted sums."""
    from scipy.special import stdtrit

    weights = np.array([contrast.weights for contrast in contrasts])
    example_variance = ((weights * noise.example) ** 2).sum(axis=1)
    draws = int(np.clip(_VALUES / (seeds * max(weights.shape)), _MIN_DRAWS, _MAX_DRAWS))
    rng = np.random.default_rng(seeds)
    by_seed = rng.normal(size=(draws, seeds, weights.shape[1])) * noise.seed
    by_seed += rng.normal(size=(draws, seeds, 1)) * noise.shared
    differences = by_seed @ weights.T
    by_example = (rng.normal(size=(draws, weights.shape[1])) * noise.example) @ weights.T
    part = differences.var(axis=1, ddof=1) / seeds
    quantiles = stdtrit([seeds - 1, MANY_DEGREES], 1 - LEVEL)  # as `compute_half_width`
    widths = np.sqrt(quantiles[0] ** 2 * part + quantiles[1] ** 2 * example_variance)
    margins = np.array([contrast.margin for contrast in contrasts])
    shown: Array = (widths - differences.mean(axis=1) - by_example - margins).max(axis=1)
    return shown


# ---- extremes ----


def _build_joint_pattern(contrasts: Sequence[PlannedContrast]) -> Array | None:
    """Return (M,) scores at which every comparison is 1; None if none is found.

    The models of the part that a comparison adds are evenly spaced; where it only subtracts, all pairs that
    it subtracts differ alike. A chain of comparisons is built from its end.
    """
    pattern = np.zeros(contrasts[0].parts[0].matrix.shape[1])
    for contrast in reversed(contrasts):
        step = _build_step(contrast.parts)
        size = _search_size(contrast.parts, pattern, step)
        if size is None:
            return None
        pattern = pattern + size * step
    values = [float(evaluate_extreme(contrast.parts, pattern)) for contrast in contrasts]
    return pattern if np.allclose(values, 1.0, atol=1e-6) else None


def _build_step(parts: Sequence[ExtremePart]) -> Array:
    """Return (M,) shifts of the models that raise a comparison."""
    adding = [part.matrix for part in parts if part.sign > 0]
    if adding:
        step: Array = adding[0].T @ np.linspace(1.0, 0.0, len(adding[0]))
        return step
    largest = max((part.matrix for part in parts), key=lambda matrix: float(np.abs(matrix).sum()))
    step = -largest.sum(axis=0)
    return step


def _search_size(parts: Sequence[ExtremePart], pattern: Array, step: Array) -> float | None:
    """Return the multiple of a step that makes a comparison 1, by bisection; None if none does."""
    low, high = 0.0, 1.0
    while evaluate_extreme(parts, pattern + high * step) < 1:
        high *= 2
        if high > _WIDEST_FACTOR:
            return None
    for _ in range(60):
        middle = (low + high) / 2
        is_above = evaluate_extreme(parts, pattern + middle * step) >= 1
        low, high = (low, middle) if is_above else (middle, high)
    return high


def _guess_difference(noise: ModelNoise, seeds: int) -> float:
    """Return a difference of the right size: that of two models like the noisiest one."""
    variances, examples = noise.seed**2 + noise.shared**2, noise.example**2
    largest = Noise(2 * float(variances.max()), 2 * float(examples.max()))
    return compute_detectable_difference(largest, seeds)


def _search_difference(
    contrasts: Sequence[PlannedContrast], noise: ModelNoise, seeds: int, level: float
) -> float | None:
    """Return the least difference that is shown, by bisection of its logarithm; None if none is found."""
    pattern = _build_joint_pattern(contrasts)
    if pattern is None:
        return None
    guess = _guess_difference(noise, seeds)
    low, high = guess / 2, guess * 4
    if not _is_shown(contrasts, noise, seeds, high * pattern, level):
        return None
    for _ in range(_SEARCH_STEPS):
        middle = math.sqrt(low * high)
        is_shown = _is_shown(contrasts, noise, seeds, middle * pattern, level)
        low, high = (low, middle) if is_shown else (middle, high)
    return math.sqrt(low * high)


def _is_shown(
    contrasts: Sequence[PlannedContrast], noise: ModelNoise, seeds: int, means: Array, level: float
) -> bool:
    """Return whether 80 % of the draws of (M,) models' scores show all comparisons.

    Draws are equal in every call, and end with the last one that may be missed.
    """
    rng = np.random.default_rng((seeds, len(means)))
    missed = 0
    for _ in range(_EXTREME_DRAWS):
        sample = _draw_sample(rng, noise, means, seeds)
        missed += not all(
            _lies_above(estimate_extreme(sample, contrast.parts), contrast.margin, level)
            for contrast in contrasts
        )
        if missed > (1 - POWER) * _EXTREME_DRAWS:
            return False
    return True


def _draw_sample(rng: np.random.Generator, noise: ModelNoise, means: Array, seeds: int) -> ScoreSample:
    """Draw scores of M models; with examples where their noise is known."""
    by_seed = means[:, None] + noise.seed[:, None] * rng.normal(size=(len(means), seeds))
    by_seed = by_seed + noise.shared[:, None] * rng.normal(size=seeds)
    if not noise.example.any():
        return ScoreSample(by_seed)
    spread = noise.example[:, None] * math.sqrt(_EXTREME_EXAMPLES)
    by_example = spread * rng.normal(size=(len(means), _EXTREME_EXAMPLES))
    scores = by_seed[:, :, None] + by_example[:, None, :]
    return ScoreSample(scores.mean(axis=2), scores, _EXTREME_EXAMPLES)


def _lies_above(estimate: EffectEstimate, margin: float, level: float) -> bool:
    """Return whether an interval lies above minus the margin."""
    low = estimate.low(level)
    return low is not None and low > -margin
