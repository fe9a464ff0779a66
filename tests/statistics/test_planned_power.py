"""Power of planned comparisons: against exact powers, and by simulating what is printed."""

import math

import numpy as np
import pytest

from gkd_lab.statistics.noise import Array, ExtremePart, ScoreSample, estimate_extreme
from gkd_lab.statistics.planned_power import (
    ModelNoise,
    PlannedContrast,
    find_failing_difference,
    find_holding_difference,
    shows_difference,
)
from gkd_lab.statistics.power import LEVEL, Noise, compute_detectable_difference


def build_noise(models: int, seed: float = 1.0, shared: float = 0.0, example: float = 0.0) -> ModelNoise:
    return ModelNoise(*(np.full(models, value) for value in (seed, shared, example)))


def build_difference(models: int, upper: int, lower: int, margin: float = 0.0) -> PlannedContrast:
    weights = np.zeros((1, models))
    weights[0, [upper, lower]] = 1, -1
    return PlannedContrast((ExtremePart(1, weights),), margin)


def build_spans(models: int) -> PlannedContrast:
    """Build the span of the first half of the models minus that of the others."""
    rows, half = np.eye(models), models // 2
    return PlannedContrast(
        tuple(
            ExtremePart(sign, way * rows[part])
            for sign, part in ((1, slice(half)), (-1, slice(half, None)))
            for way in (1, -1)
        )
    )


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_one_comparison_needs_the_exact_difference(seeds: int) -> None:
    """By 20,000 draws or fewer, within 3 %."""
    noise, contrast = build_noise(2, seed=1.5), build_difference(2, 0, 1)
    exact = compute_detectable_difference(Noise(2 * 1.5**2), seeds)
    assert find_holding_difference([contrast], noise, seeds) == pytest.approx(exact, rel=0.03)
    assert find_failing_difference([contrast], noise, seeds) == pytest.approx(-exact)


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_noise_of_examples_is_part_of_a_difference(seeds: int) -> None:
    """By draws, against the average over the seeds' estimated variance: within 5 %."""
    noise, contrast = build_noise(2, seed=1.5, example=1.5), build_difference(2, 0, 1)
    expected = compute_detectable_difference(Noise(2 * 1.5**2, 2 * 1.5**2), seeds)
    assert find_holding_difference([contrast], noise, seeds) == pytest.approx(expected, rel=0.05)


def test_what_all_models_of_a_seed_share_cancels_only_in_paired_differences() -> None:
    shared = ModelNoise(np.array([1.0, 1.0, 0.0]), np.array([9.0, 9.0, 0.0]), np.zeros(3))
    paired, with_start = build_difference(3, 0, 1), build_difference(3, 0, 2)
    assert paired.compute_noise(shared) == Noise(2.0)
    assert with_start.compute_noise(shared) == Noise(82.0)


def test_a_margin_is_subtracted_from_what_holds_and_from_what_fails() -> None:
    noise, plain = build_noise(2), build_difference(2, 0, 1)
    wide = build_difference(2, 0, 1, margin=1.3)
    pairs = [
        [find([contrast], noise, 5) for contrast in (plain, wide)]
        for find in (find_holding_difference, find_failing_difference)
    ]
    assert [before - after for before, after in pairs] == pytest.approx([1.3, 1.3])  # type: ignore[operator]


def test_more_comparisons_need_a_larger_difference_both_ways() -> None:
    noise, contrasts = build_noise(6), [build_difference(6, 0, lower) for lower in range(1, 6)]
    alone, together = (find_holding_difference(c, noise, 5) for c in (contrasts[:1], contrasts))
    assert alone is not None and together is not None and 1.2 * alone < together < 2 * alone
    adjusted = compute_detectable_difference(Noise(2.0), 5, LEVEL / 5)
    assert find_failing_difference(contrasts, noise, 5) == pytest.approx(-adjusted)


@pytest.mark.parametrize(("contrast", "seeds"), [(build_difference(10, 0, 1), 1), (build_spans(10), 2)])
def test_too_few_seeds_show_nothing(contrast: PlannedContrast, seeds: int) -> None:
    noise = build_noise(10)
    assert find_holding_difference([contrast], noise, seeds) is None
    assert find_failing_difference([contrast], noise, seeds) is None
    assert not shows_difference([contrast], noise, seeds, 99.0)


@pytest.mark.parametrize("difference", [1.0, -1.0])
def test_a_verdict_is_shown_from_the_printed_difference_on(difference: float) -> None:
    contrasts, noise = [build_difference(3, 0, 1), build_difference(3, 0, 2)], build_noise(3)
    find = find_holding_difference if difference > 0 else find_failing_difference
    least = find(contrasts, noise, 5)
    assert least is not None
    assert shows_difference(contrasts, noise, 5, 1.05 * least)
    assert not shows_difference(contrasts, noise, 5, 0.95 * least)


def test_no_pattern_of_scores_gives_contradicting_comparisons_one_value() -> None:
    spans = build_spans(10)
    assert find_holding_difference([spans, spans.reverse()], build_noise(10), 5) is None


def count_shown(contrast: PlannedContrast, means: Array, seeds: int, tables: int) -> int:
    rng = np.random.default_rng(0)
    draws = [ScoreSample(means[:, None] + rng.normal(0, 1, (len(means), seeds))) for _ in range(tables)]
    return sum(estimate_extreme(draw, contrast.parts).low() > 0 for draw in draws)  # type: ignore[operator]


def test_the_printed_difference_of_spans_is_found_in_four_of_five_tables() -> None:
    """80 % of 500 tables, within three binomial errors of those and of the 150 that it is searched with."""
    contrast, noise = build_spans(10), build_noise(10)
    difference = find_holding_difference([contrast], noise, 5)
    assert difference is not None
    means = np.concatenate([difference * np.linspace(1, 0, 5), np.zeros(5)])
    found = count_shown(contrast, means, 5, 500) / 500
    assert abs(found - 0.8) < 3 * math.sqrt(0.8 * 0.2 * (1 / 500 + 1 / 150))


def test_noise_of_examples_is_part_of_a_span() -> None:
    contrast = build_spans(6)
    without, with_examples = (
        find_holding_difference([contrast], build_noise(6, example=example), 5) for example in (0.0, 2.0)
    )
    assert without is not None and with_examples is not None and with_examples > 1.5 * without
