"""Power: detectable differences against simulation, and the seeds that an open claim needs."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import special, stats

from gkd_lab.statistics.noise import (
    Array,
    EffectEstimate,
    ExtremePart,
    ScoreSample,
    estimate_contrast,
    estimate_extreme,
)
from gkd_lab.statistics.power import (
    LEVEL,
    Noise,
    compute_detectable_difference,
    compute_power,
    estimate_required_seeds,
    find_least_seeds,
    needs_more_examples,
)

DIFFERENCE = np.array([1.0, -1.0])


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_detectable_difference_is_found_in_four_of_five_tables(seeds: int) -> None:
    """800 of 1,000, within three binomial errors."""
    difference = compute_detectable_difference(Noise(2.0), seeds)
    rng = np.random.default_rng(seeds)
    found = 0
    for _ in range(1000):
        scores = rng.normal(0, 1, (2, seeds)) + np.array([[difference], [0.0]])
        found += estimate_contrast(ScoreSample(scores), DIFFERENCE).low() > 0  # type: ignore[operator]
    assert abs(found - 800) < 3 * math.sqrt(1000 * 0.8 * 0.2)


def test_power_is_that_of_the_noncentral_t() -> None:
    expected = stats.nct.sf(stats.t.isf(0.025, 4), 4, 3.0 / math.sqrt(2.0 / 5))
    assert compute_power(Noise(2.0), 5, 3.0) == pytest.approx(expected)
    assert compute_power(Noise(2.0), 5, compute_detectable_difference(Noise(2.0), 5)) == pytest.approx(0.8)


def test_power_is_known_where_scipy_knows_it_not() -> None:
    assert math.isnan(special.nctdtr(1e6, 38.0, stats.norm.isf(0.025)))
    assert compute_power(Noise(1.0, 1.0), 10**6, 38.0) == 1.0
    assert all(0 <= compute_power(Noise(2.0), 3, float(effect)) <= 1 for effect in range(-60, 60))


def test_a_single_seed_detects_nothing() -> None:
    assert compute_detectable_difference(Noise(1.0), 1) == math.inf
    assert compute_power(Noise(1.0), 1, 100.0) == 0.0


def test_noise_of_examples_bounds_what_seeds_can_show() -> None:
    limits = [compute_detectable_difference(Noise(1.0, 4.0), seeds) for seeds in (3, 10, 1000)]
    assert limits[0] > limits[1] > limits[2] > 2.8 * 2.0 - 0.01


def test_more_comparisons_need_a_larger_difference() -> None:
    adjusted = compute_detectable_difference(Noise(1.0), 5, LEVEL / 10)
    assert adjusted > compute_detectable_difference(Noise(1.0), 5)


@pytest.mark.parametrize(("least", "expected"), [(2, 2), (7, 7), (200, 200), (201, None)])
def test_the_least_number_of_seeds_is_found(least: int, expected: int | None) -> None:
    assert find_least_seeds(lambda seeds: seeds >= least) == expected


def test_required_seeds_are_those_at_which_the_effect_becomes_detectable() -> None:
    scores = np.array([[51.5, 50.2, 51.0], [50.0, 50.3, 49.7]])
    estimate = estimate_contrast(ScoreSample(scores), DIFFERENCE)
    seeds = estimate_required_seeds([estimate], [0.0])
    assert seeds is not None and seeds > 3
    noise = Noise(estimate.seed_variance, estimate.example_variance)
    assert compute_detectable_difference(noise, seeds) <= estimate.effect
    assert compute_detectable_difference(noise, seeds - 1) > estimate.effect


def build_estimate(
    effect: float, error: float = 1.0, seeds: int = 4, example_share: float = 0.0
) -> EffectEstimate:
    variance = error**2
    return EffectEstimate(
        effect, effect, effect, error, seeds - 1.0, seeds, 100, "made",
        seed_variance=variance * (1 - example_share) * seeds, example_variance=variance * example_share,
    )  # fmt: skip


def test_one_comparison_that_lies_below_decides_a_claim_whatever_the_others_are() -> None:
    near_zero, below = build_estimate(0.01), build_estimate(-2.0)
    assert estimate_required_seeds([near_zero], [0.0]) is None
    alone, among_two = (
        estimate_required_seeds(estimates, [0.0] * len(estimates), LEVEL / len(estimates))
        for estimates in ([below], [below, near_zero])
    )
    assert alone is not None and among_two is not None and 4 < alone < among_two < 20


def test_a_margin_moves_the_bound_that_must_be_shown() -> None:
    seeds = [estimate_required_seeds([build_estimate(0.0)], [margin]) for margin in (0.0, 1.0, 2.0)]
    assert seeds[0] is None
    assert seeds[1] is not None and seeds[2] is not None and seeds[2] < seeds[1]


def test_too_few_examples_are_told_from_too_small_an_effect() -> None:
    few, small = build_estimate(1.5, example_share=0.9), build_estimate(0.01, example_share=0.9)
    assert estimate_required_seeds([few], [0.0]) is None and needs_more_examples(few)
    assert estimate_required_seeds([small], [0.0]) is None and not needs_more_examples(small)


def test_no_number_of_seeds_decides_an_effect_of_nearly_nothing() -> None:
    scores = np.array([[50.01, 51.0, 49.0], [50.0, 50.0, 50.0]])
    assert estimate_required_seeds([estimate_contrast(ScoreSample(scores), DIFFERENCE)], [0.0]) is None


def test_models_that_agree_on_every_example_stay_open_whatever_the_seeds() -> None:
    same = np.full((2, 3, 50), 100.0)
    estimate = estimate_contrast(ScoreSample(same.mean(axis=2), same, 50), DIFFERENCE)
    assert estimate_required_seeds([estimate], [0.0]) is None
    assert estimate_required_seeds([estimate], [6.0]) == 4  # a difference of one example, 2 points


def test_differences_that_are_all_equal_are_as_noisy_as_examples_that_fall_to_either_side() -> None:
    """10 points are 5 of 50 examples, whose difference has a variance of 5 examples: 20 squared points."""
    scores = np.stack([np.full((3, 50), 60.0), np.full((3, 50), 50.0)])
    certain = estimate_contrast(ScoreSample(scores.mean(axis=2), scores, 50), DIFFERENCE)
    assert certain.example_variance == pytest.approx(20.0)
    assert estimate_required_seeds([certain], [0.0]) is None
    assert estimate_required_seeds([certain], [10.0]) == 4


def test_unknown_noise_needs_an_unknown_number_of_seeds() -> None:
    same = estimate_contrast(ScoreSample(np.array([[50.2, 50.2], [50.0, 50.0]])), DIFFERENCE)
    assert estimate_required_seeds([same, build_estimate(1.0)], [0.0, 0.0]) is None


def judge(estimates: Sequence[EffectEstimate]) -> str:
    if all(estimate.low() > 0 for estimate in estimates):  # type: ignore[operator]
        return "holds"
    level = LEVEL / len(estimates)
    return "fails" if any(e.high(level) < 0 for e in estimates) else "undecided"  # type: ignore[operator]


def compare_with_others() -> list[list[ExtremePart]]:
    """Compare the first of five models with each of the others."""
    return [[ExtremePart(1, (np.eye(5)[0] - np.eye(5)[n])[None])] for n in range(1, 5)]


def compare_spans() -> list[list[ExtremePart]]:
    """Compare the span of the first five of ten models with that of the others."""
    rows = np.eye(10)
    return [
        [
            ExtremePart(sign, way * rows[part])
            for sign, part in ((1, slice(5)), (-1, slice(5, 10)))
            for way in (1, -1)
        ]
    ]


@pytest.mark.parametrize(
    ("contrasts", "spread"),
    [(compare_with_others(), [2.0, 0, 0, 0, 0]), (compare_spans(), [2.0] * 5 + [0.5] * 5)],
)
def test_the_required_seeds_decide_most_open_claims(
    contrasts: list[list[ExtremePart]], spread: Sequence[float]
) -> None:
    """80 % if effects were as measured; their own error leaves 70 %, here at least 60 % of 100 claims."""
    rng = np.random.default_rng(0)
    decided: list[bool] = []
    while len(decided) < 100:
        means = rng.normal(0, 1, len(spread)) * np.array(spread)
        scores: Array = means[:, None] + rng.normal(0, 1, (len(spread), 200))
        estimates = [estimate_extreme(ScoreSample(scores[:, :4]), parts) for parts in contrasts]
        seeds = estimate_required_seeds(estimates, [0.0] * len(estimates), LEVEL / len(estimates))
        if judge(estimates) == "undecided" and seeds is not None:
            later = [estimate_extreme(ScoreSample(scores[:, :seeds]), parts) for parts in contrasts]
            decided.append(judge(later) != "undecided")
    assert 60 <= sum(decided) <= 90


def test_models_that_agree_on_every_example_are_not_decided_by_more_seeds() -> None:
    same = np.full((2, 3, 50), 100.0)
    estimate = estimate_contrast(ScoreSample(same.mean(axis=2), same, 50), DIFFERENCE)
    assert estimate_required_seeds([estimate], [0.0]) is None
    assert not needs_more_examples(estimate)
    assert compute_power(Noise(0.0), 3, 0.0) == 0.0 < compute_power(Noise(0.0), 3, 0.1)
