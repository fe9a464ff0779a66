"""One model of noise for comparisons of models: seeds and test examples are crossed sources.

Shapes: M models, S seeds, N examples. All seeds are evaluated on the same examples, so the examples' share
of the noise does not shrink with more seeds: the variance of a mean difference over both is
V_seeds / S + V_examples / N + V_residual / (S N), estimated from the mean squares of a two-way table
without replication (Searle, Casella and McCulloch 1992). Each source has Student's t of its own degrees of
freedom (Cochran 1964): Satterthwaite's are too many for two or three seeds. The pigeonhole bootstrap (Owen
and Eckles 2012) estimates the same variance by resampling.

Largest and smallest scores ("best of", spans) are biased upwards and downwards by the choice. Each end of
their interval uses the estimate whose remaining bias widens it: cross-fitting on half of the seeds and
examples (the choice from one half, its score from the other) on one side, a bootstrap that subtracts the
bias on the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_SEEDS_EXTREME = 3
"""Seeds below which a largest or smallest score gets no interval: a half of two seeds has no noise."""
FULL_SCORE = 100.0
"""Points of one example's largest score; the unit of a mean over N examples is FULL_SCORE / N."""
DIFFERENCE: Array = np.array([1.0, -1.0])
"""Weights of the first of two models minus the second."""
_BISECTIONS = 60
_DRAWS = 400
_SPLITS = 64
_GRID_TOLERANCE = 1e-6
_RESIDUAL_SHARE = 0.05
"""Share of the residual mean square that the seeds' mean square is at least."""
_ROUNDING = 1e-9
"""Differences below this share of the scores are rounding."""
_RELATIVE_ZERO = 1e-12
"""Variances below this share of the squared scores are rounding."""


@dataclass(frozen=True)
class ScoreSample:
    """Scores of M models that share their seeds and examples."""

    seed_scores: Array
    """(M, S) points."""
    example_scores: Array | None = None
    """(M, S, N) points whose mean over N is `seed_scores`; None: not known."""
    example_count: int | None = None
    """Examples behind each score; known even where their own scores are not."""

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return int(self.seed_scores.shape[1])


@dataclass(frozen=True)
class EffectEstimate:
    """An effect with what its interval needs: centres of both ends, standard error, degrees of freedom."""

    effect: float
    low_center: float
    high_center: float
    standard_error: float | None
    """None: no interval."""
    degrees: float
    seeds: int
    examples: int | None
    """Examples that the interval covers, crossed with the seeds; None: it covers seeds only."""
    method: str
    seed_variance: float = 0.0
    """Squared points; this part of the variance is `seed_variance` / S."""
    example_variance: float = 0.0
    """Squared points; the part that more seeds do not reduce."""

    def low(self, level: float = 0.025) -> float | None:
        """Return the low end of the interval that leaves out `level` below; None without interval."""
        return None if self.standard_error is None else self.low_center - self.compute_half_width(level)

    def high(self, level: float = 0.025) -> float | None:
        """Return the high end of the interval that leaves out `level` above; None without interval."""
        return None if self.standard_error is None else self.high_center + self.compute_half_width(level)

    def compute_half_width(self, level: float) -> float:
        """Return the distance of either end from its centre, in points.

        With two sources of noise each has Student's t of its own degrees of freedom (Cochran 1964).
        """
        assert self.standard_error is not None, "an estimate with an interval"
        seed_part, example_part = self.seed_variance / self.seeds, self.example_variance
        total = seed_part + example_part
        if self.examples is None or self.seeds < 2 or total == 0:
            return compute_t_quantile(level, self.degrees) * self.standard_error
        seed_quantile = compute_t_quantile(level, self.seeds - 1)
        example_quantile = compute_t_quantile(level, self.examples - 1)
        square = (seed_quantile**2 * seed_part + example_quantile**2 * example_part) / total
        return float(np.sqrt(square)) * self.standard_error

    @property
    def verdict(self) -> str:
        """`higher` or `lower` if the interval lies on one side of 0; `undecided` if not, or for one seed."""
        low, high = self.low(), self.high()
        if self.seeds < 2 or low is None or high is None or low <= 0 <= high:
            return "undecided"
        return "higher" if low > 0 else "lower"

    @property
    def p_value(self) -> float | None:
        """Two-sided p-value of a contrast of 0: twice the level of the interval that ends at 0."""
        if self.standard_error is None:
            return None
        if self.standard_error == 0:
            return float(self.effect == 0)
        low, high = 0.0, 0.5
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_inside = middle > 0 and self.compute_half_width(middle) >= abs(self.effect)
            low, high = (middle, high) if is_inside else (low, middle)
        return 2 * high


def compute_t_quantile(level: float, degrees: float) -> float:
    """Return Student's t above which a share `level` lies."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 1 - level))


# ---- linear contrasts ----


def estimate_contrast(sample: ScoreSample, weights: Array) -> EffectEstimate:
    """Estimate the mean over seeds and examples of `weights` (M,) times the models' scores."""
    differences = weights @ sample.seed_scores
    effect = float(differences.mean())
    if sample.example_scores is not None:
        scale = float(np.abs(sample.example_scores).max())
        return _estimate_crossed(np.tensordot(weights, sample.example_scores, axes=1), scale)
    error, method = _estimate_seed_error(differences, sample.example_count)
    return EffectEstimate(
        effect, effect, effect, error, sample.seeds - 1.0, sample.seeds, None, method,
        seed_variance=0.0 if error is None else error**2 * sample.seeds,
    )  # fmt: skip


def _estimate_seed_error(differences: Array, example_count: int | None) -> tuple[float | None, str]:
    """Return (standard error of the mean of (S,) differences or None, name of the method).

    Scores of N examples agree by chance, so where they are equal or multiples of 1 / N a mean difference of
    k examples counts as noisy as k examples that fall to either side at random (McNemar 1947): a variance of
    at least k per seed.
    """
    seeds = len(differences)
    if seeds < 2:
        return None, "one seed, no interval"
    scale = float(np.abs(differences).max()) or 1.0
    variance = float(differences.var(ddof=1))
    if variance <= _RELATIVE_ZERO * scale**2:
        variance = 0.0
    step = None if example_count is None else FULL_SCORE / example_count
    if step is not None and (variance == 0.0 or _is_on_grid(differences, step)):
        count = max(1.0, abs(float(differences.mean())) / step)
        variance = max(variance, count * step**2)
    if variance == 0.0:
        return None, f"{seeds} seeds with equal differences, so their noise is not known"
    return float(np.sqrt(variance / seeds)), f"t over {seeds} seeds; noise of the examples not known"


def _is_on_grid(values: Array, step: float) -> bool:
    """Return whether all values are multiples of `step`."""
    return bool(np.all(np.abs(values / step - np.round(values / step)) < _GRID_TOLERANCE * 100))


def _estimate_crossed(differences: Array, scale: float) -> EffectEstimate:
    """Estimate the mean of an (S, N) table of differences; both ways are random and crossed.

    scale: Largest of the scores, of which differences below a billionth are rounding.
    """
    seeds, examples = differences.shape
    effect = float(differences.mean())
    floor = _compute_floor(differences, scale)
    if seeds == 1:
        variance = max(float(differences.var(ddof=1)) / examples, floor)
        method = f"one seed: {examples} examples only"
        return EffectEstimate(
            effect, effect, effect, float(np.sqrt(variance)), examples - 1.0, 1, examples, method,
            example_variance=variance,
        )  # fmt: skip
    by_seed, by_example, residual = _compute_mean_squares(differences)
    by_seed = max(by_seed, _RESIDUAL_SHARE * residual)  # seeds that agree by chance
    seed_variance = by_seed / examples
    example_variance = max(by_example - residual, 0.0) / differences.size + floor
    return EffectEstimate(
        effect, effect, effect, float(np.sqrt(seed_variance / seeds + example_variance)), seeds - 1.0,
        seeds, examples, f"{seeds} seeds x {examples} examples, crossed",
        seed_variance=seed_variance, example_variance=example_variance,
    )  # fmt: skip


def _compute_floor(differences: Array, scale: float) -> float:
    """Return the least variance of the mean of an (S, N) table: 0 unless all of its differences are equal.

    Equal differences tell no noise. Then, as for seeds that agree by chance, a mean difference of k examples
    counts as noisy as k examples that fall to either side at random; at least one differs.
    """
    step = FULL_SCORE / differences.shape[1]
    if np.ptp(differences) > _ROUNDING * scale:
        return 0.0
    return float(max(1.0, abs(differences.mean()) / step) * step**2)


def estimate_unpaired(before: Array, after: Array) -> EffectEstimate:
    """Estimate mean `after` (N2,) minus mean `before` (N1,): one model each, on examples of its own.

    Welch's t; models whose examples all score the same differ by one example at least.
    """
    counts = np.array([len(before), len(after)])
    effect, errors = float(after.mean() - before.mean()), np.array([before.var(ddof=1), after.var(ddof=1)])
    errors = errors / counts
    if errors.sum() == 0:
        errors = (FULL_SCORE / counts) ** 2
    degrees = float(errors.sum() ** 2 / (errors**2 / (counts - 1)).sum())
    error, total = float(np.sqrt(errors.sum())), int(counts.sum())
    method = f"one seed: {total} examples only, not paired"
    return EffectEstimate(effect, effect, effect, error, degrees, 1, total, method, example_variance=error**2)


def _compute_mean_squares(differences: Array) -> tuple[float, float, float]:
    """Return the mean squares of seeds, examples and residual of an (S, N) table."""
    seeds, examples = differences.shape
    mean, seed_means, example_means = (
        differences.mean(), differences.mean(axis=1), differences.mean(axis=0),
    )  # fmt: skip
    by_seed = examples * float(seed_means.var(ddof=1))
    by_example = seeds * float(example_means.var(ddof=1))
    squares = float(((differences - mean) ** 2).sum())
    rest = squares - (seeds - 1) * by_seed - (examples - 1) * by_example
    return by_seed, by_example, max(rest, 0.0) / ((seeds - 1) * (examples - 1))


# ---- extremes ----


@dataclass(frozen=True)
class ExtremePart:
    """`sign` times the largest of some contrasts: `max(matrix @ scores)`.

    The smallest of some scores is minus the largest of their negatives; one row is a plain contrast.
    """

    sign: int
    matrix: Array
    """(K, M) weights."""


def evaluate_extreme(parts: Sequence[ExtremePart], scores: Array) -> Array:
    """Return the sum of the parts for (..., M) scores, uncorrected."""
    total: Array = np.sum([part.sign * (scores @ part.matrix.T).max(axis=-1) for part in parts], axis=0)
    return total


def estimate_extreme(sample: ScoreSample, parts: Sequence[ExtremePart]) -> EffectEstimate:
    """Estimate a sum of largest contrasts over seeds and examples, without the bias of choosing them.

    A part that adds is too large as it is. The low end takes its cross-fitted value, and subtracts from
    the other parts the bootstrap's bias; the high end does the opposite.
    """
    means = sample.seed_scores.mean(axis=1)
    chosen = estimate_contrast(sample, _select_contrast(parts, means))
    if all(len(part.matrix) == 1 for part in parts):
        return chosen
    if sample.seeds < MIN_SEEDS_EXTREME or chosen.standard_error is None:
        reason = f"{sample.seeds} seeds; the largest of several needs {MIN_SEEDS_EXTREME}"
        method = reason if sample.seeds < MIN_SEEDS_EXTREME else chosen.method
        effect = float(evaluate_extreme(parts, means))
        return EffectEstimate(effect, effect, effect, None, 1.0, sample.seeds, chosen.examples, method)
    errors = _draw_errors(sample)
    draws = means + errors
    too_large = [part.sign * _subtract_bias(part, means, draws) for part in parts]
    unbiased = [part.sign * _cross_fit(part, sample) for part in parts]
    pairs = list(zip(parts, too_large, unbiased, strict=True))
    low_center = sum(fitted if part.sign > 0 else shifted for part, shifted, fitted in pairs)
    high_center = sum(shifted if part.sign > 0 else fitted for part, shifted, fitted in pairs)
    return replace(
        chosen,
        effect=(low_center + high_center) / 2,
        low_center=min(low_center, high_center),
        high_center=max(low_center, high_center),
        standard_error=max(
            _average_error(parts, means, errors, chosen.standard_error),
            float(evaluate_extreme(parts, draws).std()),
        ),
        method=f"{chosen.method}; bias of choosing removed",
    )


def _average_error(parts: Sequence[ExtremePart], means: Array, errors: Array, chosen_error: float) -> float:
    """Return the root mean square of the standard errors of the contrasts that (R, M) draws choose.

    Scaled by what a floor adds to that of the contrast chosen at the means.
    """
    covariance = errors.T @ errors / len(errors)
    rows = [part.matrix[((means + errors) @ part.matrix.T).argmax(axis=1)] for part in parts]
    contrasts = np.sum([part.sign * row for part, row in zip(parts, rows, strict=True)], axis=0)
    variance = float(((contrasts @ covariance) * contrasts).sum(axis=1).mean())
    chosen = _select_contrast(parts, means)
    chosen_variance = float(chosen @ covariance @ chosen)
    scale = max(1.0, chosen_error / np.sqrt(chosen_variance)) if chosen_variance > 0 else 1.0
    return float(np.sqrt(variance) * scale) or chosen_error


def _select_contrast(parts: Sequence[ExtremePart], means: Array) -> Array:
    """Return the (M,) contrast that the parts choose at these means."""
    chosen: Array = np.sum(
        [part.sign * part.matrix[(part.matrix @ means).argmax()] for part in parts], axis=0
    )
    return chosen


def _subtract_bias(part: ExtremePart, means: Array, draws: Array) -> float:
    """Return the largest contrast minus what the choice among (R, M) draws adds to it on average."""
    largest = float((part.matrix @ means).max())
    return 2 * largest - float((draws @ part.matrix.T).max(axis=1).mean())


def _draw_errors(sample: ScoreSample) -> Array:
    """Return (R, M) draws of the errors of the models' means, by a Gaussian multiplier bootstrap.

    The models keep their correlations over seeds and over examples.
    """
    seeds = sample.seeds
    centered = sample.seed_scores - sample.seed_scores.mean(axis=1, keepdims=True)
    errors: Array = _draw_normals(seeds, 0) @ centered.T / np.sqrt(seeds * (seeds - 1))
    if sample.example_scores is not None:
        by_example = sample.example_scores.mean(axis=1)
        by_example = by_example - by_example.mean(axis=1, keepdims=True)
        examples = by_example.shape[1]
        share = _compute_example_share(sample.example_scores)
        errors = errors + np.sqrt(share / (examples * (examples - 1))) * (
            _draw_normals(examples, 1) @ by_example.T
        )
    return errors


def _compute_example_share(example_scores: Array) -> float:
    """Return the share of the examples' variance of the models' means that is not residual noise."""
    squares = np.array([_compute_mean_squares(scores)[1:] for scores in example_scores]).sum(axis=0)
    return float(max(squares[0] - squares[1], 0.0) / squares[0]) if squares[0] > 0 else 0.0


def _cross_fit(part: ExtremePart, sample: ScoreSample) -> float:
    """Return the score on one half of the contrast chosen on the other, averaged over halves both ways."""
    if len(part.matrix) == 1:
        return float(part.matrix[0] @ sample.seed_scores.mean(axis=1))
    first, second = (means @ part.matrix.T for means in _average_halves(sample))
    rows = np.arange(len(first))
    forth = second[rows, first.argmax(axis=1)]
    back = first[rows, second.argmax(axis=1)]
    return float((forth + back).mean() / 2)


def _average_halves(sample: ScoreSample) -> tuple[Array, Array]:
    """Return two (R, M) arrays of the models' means over random halves of the seeds and of the examples."""
    seed_halves = _draw_halves(sample.seeds, 2)
    if sample.example_scores is None:
        first, second = (half @ sample.seed_scores.T for half in seed_halves)
        return first, second
    models, seeds, examples = sample.example_scores.shape
    flat = sample.example_scores.transpose(1, 0, 2).reshape(seeds, models * examples)
    example_halves = _draw_halves(examples, 3)
    first, second = (
        np.einsum("rmn,rn->rm", (half @ flat).reshape(-1, models, examples), chosen)
        for half, chosen in zip(seed_halves, example_halves, strict=True)
    )
    return first, second


@cache
def _draw_normals(count: int, stream: int) -> Array:
    """Return (R, count) standard normal draws, equal in every call; each with its negative."""
    normals = np.random.default_rng((count, stream)).standard_normal((_DRAWS // 2, count))
    return np.concatenate([normals, -normals])


@cache
def _draw_halves(count: int, stream: int) -> tuple[Array, Array]:
    """Return (R, count) weights of means over a random half and over the other; equal in every call."""
    order = np.random.default_rng((count, stream)).random((_SPLITS, count)).argsort(axis=1)
    is_first = order < count // 2
    halves = np.stack([is_first, ~is_first]).astype(float)
    first, second = halves / halves.sum(axis=2, keepdims=True)
    return first, second
