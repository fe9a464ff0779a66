"""Intervals of contrasts and extremes: hand values, floors, and coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from gkd_lab.statistics.noise import (
    Array,
    ExtremePart,
    ScoreSample,
    estimate_contrast,
    estimate_extreme,
    estimate_unpaired,
    evaluate_extreme,
)

DIFFERENCE = np.array([1.0, -1.0])


def draw_sample(
    rng: np.random.Generator,
    seeds: int,
    examples: int,
    seed_noise: float,
    example_noise: float,
    residual: float,
) -> ScoreSample:
    """Draw two models without a true difference; the second carries all noise."""
    noise = rng.normal(0, seed_noise, (seeds, 1)) + rng.normal(0, example_noise, (1, examples))
    noise = noise + rng.normal(0, residual, (seeds, examples))
    scores = np.stack([np.full((seeds, examples), 50.0), 50.0 + noise])
    return ScoreSample(scores.mean(axis=2), scores, examples)


def build_span(models: int, indices: range, sign: int) -> list[ExtremePart]:
    rows = np.eye(models)[list(indices)]
    return [ExtremePart(sign, rows), ExtremePart(sign, -rows)]


def test_seeds_alone_give_students_t() -> None:
    scores = np.array([[52.0, 53.1, 50.2], [50.0, 50.0, 50.0]])
    estimate = estimate_contrast(ScoreSample(scores), DIFFERENCE)
    differences = scores[0] - scores[1]
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert (estimate.low(), estimate.high()) == pytest.approx((low, high))
    assert (estimate.seeds, estimate.examples) == (3, None)


def test_crossed_noise_adds_the_mean_squares_of_a_two_way_table() -> None:
    differences = np.array([[1.0, 4.0, 2.0, 5.0], [3.0, 8.0, 1.0, 9.0], [2.0, 6.0, 4.0, 11.0]])
    estimate = estimate_contrast(ScoreSample(np.zeros((1, 3)), differences[None]), np.array([1.0]))
    seeds = 4 * differences.mean(axis=1).var(ddof=1)
    examples = 3 * differences.mean(axis=0).var(ddof=1)
    fitted = differences.mean(axis=1)[:, None] + differences.mean(axis=0) - differences.mean()
    residual = float(((differences - fitted) ** 2).sum()) / 6
    assert seeds > residual / 2 and examples > residual
    assert estimate.standard_error == pytest.approx(math.sqrt((seeds + examples - residual) / 12))
    assert estimate.seed_variance / 3 + estimate.example_variance == pytest.approx(estimate.standard_error**2)


def test_one_seed_covers_its_examples_only() -> None:
    differences = np.array([[1.0, 4.0, 2.0, 5.0]])
    estimate = estimate_contrast(ScoreSample(np.zeros((1, 1)), differences[None]), np.array([1.0]))
    assert estimate.standard_error == pytest.approx(stats.sem(differences[0]))
    assert estimate.seeds == 1


@pytest.mark.parametrize(("seeds", "expected"), [(2, math.sqrt(1 / 2)), (3, math.sqrt(1 / 3))])
def test_seeds_that_agree_by_one_example_are_as_noisy_as_a_coin(seeds: int, expected: float) -> None:
    """+0.2 of 500 examples is one example, in each seed."""
    scores = np.array([[50.2] * seeds, [50.0] * seeds])
    estimate = estimate_contrast(ScoreSample(scores, example_count=500), DIFFERENCE)
    assert estimate.standard_error == pytest.approx(0.2 * expected)


def test_equal_differences_of_an_unknown_number_of_examples_have_no_interval() -> None:
    scores = np.array([[50.2, 50.2], [50.0, 50.0]])
    assert estimate_contrast(ScoreSample(scores), DIFFERENCE).low() is None


def test_models_that_agree_on_every_example_may_differ_on_the_next() -> None:
    same = np.full((2, 3, 50), 100.0)
    estimate = estimate_contrast(ScoreSample(same.mean(axis=2), same, 50), DIFFERENCE)
    assert (estimate.effect, estimate.standard_error) == (0.0, 2.0)
    assert (estimate.seed_variance, estimate.example_variance) == (0.0, 4.0)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("noise", [(1.0, 7.0, 7.0), (1.0, 3.0, 7.0), (0.0, 7.0, 3.0), (1.0, 0.0, 0.1)])
def test_intervals_cover_crossed_noise(seeds: int, noise: tuple[float, float, float]) -> None:
    """At least 93 % of 1,000 intervals; the bound is three binomial errors below."""
    rng = np.random.default_rng((seeds, *(int(10 * value) for value in noise)))
    estimates = [estimate_contrast(draw_sample(rng, seeds, 50, *noise), DIFFERENCE) for _ in range(1000)]
    covered = sum(estimate.low() <= 0 <= estimate.high() for estimate in estimates)  # type: ignore[operator]
    assert sum(estimate.p_value >= 0.05 for estimate in estimates) == covered  # type: ignore[operator]
    assert covered > 930 - 3 * math.sqrt(1000 * 0.93 * 0.07)


def test_the_p_value_is_student_s() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom."""
    scores = np.array([[51.0, 52.0, 53.0], [50.0, 50.0, 50.0]])
    assert estimate_contrast(ScoreSample(scores), DIFFERENCE).p_value == pytest.approx(0.0742, abs=1e-4)
    differences = [0.3, -1.2, 2.5, 0.9]
    estimate = estimate_contrast(ScoreSample(np.array([differences])), np.ones(1))
    assert estimate.p_value == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue)
    assert estimate_contrast(ScoreSample(scores[:, :1]), DIFFERENCE).p_value is None


def test_models_on_different_examples_are_compared_by_welch_s_t() -> None:
    rng = np.random.default_rng(5)
    before, after = rng.normal(50, 30, 40), rng.normal(60, 10, 25)
    expected = stats.ttest_ind(after, before, equal_var=False)
    estimate = estimate_unpaired(before, after)
    assert estimate.p_value == pytest.approx(expected.pvalue)
    assert (estimate.low(), estimate.high()) == pytest.approx(tuple(expected.confidence_interval()))
    same = estimate_unpaired(np.full(50, 100.0), np.full(25, 100.0))
    assert (same.effect, same.standard_error) == (0.0, pytest.approx(math.hypot(2, 4)))


def draw_scores(rng: np.random.Generator, means: Array, noise: Array, seeds: int) -> ScoreSample:
    return ScoreSample(means[:, None] + rng.normal(0, 1, (len(means), seeds)) * noise[:, None])


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_equal_spans_differ_no_more_often_than_by_chance_when_one_is_noisier(seeds: int) -> None:
    """Largest minus smallest grows with noise: the naive difference calls most of these a shrinking span."""
    rng = np.random.default_rng(seeds)
    parts = [*build_span(10, range(5), 1), *build_span(10, range(5, 10), -1)]
    noise = np.repeat([1.0, 0.3], 5)
    estimates = [estimate_extreme(draw_scores(rng, np.zeros(10), noise, seeds), parts) for _ in range(400)]
    false_holds = sum(estimate.low() > 0 for estimate in estimates)  # type: ignore[operator]
    assert false_holds <= 0.035 * 400 + 3 * math.sqrt(400 * 0.035 * 0.965)


def test_a_span_that_shrinks_is_found() -> None:
    rng = np.random.default_rng(1)
    parts = [*build_span(10, range(5), 1), *build_span(10, range(5, 10), -1)]
    means = np.concatenate([np.linspace(0, 3, 5), np.linspace(0, 0.6, 5)])
    estimates = [estimate_extreme(draw_scores(rng, means, np.full(10, 0.4), 5), parts) for _ in range(200)]
    assert sum(estimate.low() > 0 for estimate in estimates) > 180  # type: ignore[operator]
    assert np.mean([estimate.effect for estimate in estimates]) == pytest.approx(2.4, abs=0.15)


def test_most_of_the_span_of_equal_models_is_recognised_as_noise() -> None:
    rng = np.random.default_rng(4)
    parts = build_span(5, range(5), 1)
    samples = [draw_scores(rng, np.zeros(5), np.ones(5), 5) for _ in range(200)]
    naive = np.mean([evaluate_extreme(parts, sample.seed_scores.mean(axis=1)) for sample in samples])
    corrected = np.mean([estimate_extreme(sample, parts).effect for sample in samples])
    assert naive == pytest.approx(2.33 / math.sqrt(5), abs=0.1)
    assert abs(corrected) < 0.4 * naive


def test_an_extreme_needs_three_seeds() -> None:
    parts = build_span(3, range(3), 1)
    scores = np.array([[1.0, 1.5], [2.0, 2.2], [3.0, 3.9]])
    estimate = estimate_extreme(ScoreSample(scores), parts)
    assert estimate.low() is None
    assert estimate.effect == pytest.approx(3.45 - 1.25)


def test_a_part_of_one_contrast_is_a_plain_contrast() -> None:
    rng = np.random.default_rng(2)
    sample = draw_scores(rng, np.array([1.0, 0.0]), np.ones(2), 4)
    assert estimate_extreme(sample, [ExtremePart(1, DIFFERENCE[None])]) == estimate_contrast(
        sample, DIFFERENCE
    )


def test_estimates_are_equal_in_every_call() -> None:
    rng = np.random.default_rng(3)
    sample = draw_scores(rng, np.zeros(5), np.ones(5), 4)
    parts = build_span(5, range(5), 1)
    assert estimate_extreme(sample, parts) == estimate_extreme(sample, parts)
