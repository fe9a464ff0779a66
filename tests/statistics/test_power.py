"""Power: detectable differences against simulation, and the seeds that an open comparison needs."""

import math

import numpy as np
import pytest

from gkd_lab.statistics.noise import ScoreSample, estimate_contrast
from gkd_lab.statistics.power import Noise, compute_detectable_difference, estimate_required_seeds

DIFFERENCE = np.array([1.0, -1.0])


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_detectable_difference_is_found_in_four_of_five_tables(seeds: int) -> None:
    difference = compute_detectable_difference(Noise(2.0), seeds)
    rng = np.random.default_rng(seeds)
    found = 0
    for _ in range(1000):
        scores = rng.normal(0, 1, (2, seeds)) + np.array([[difference], [0.0]])
        found += estimate_contrast(ScoreSample(scores), DIFFERENCE).low() > 0  # type: ignore[operator]
    assert 760 <= found <= 860


def test_a_single_seed_detects_nothing() -> None:
    assert compute_detectable_difference(Noise(1.0), 1) == math.inf


def test_noise_of_examples_bounds_what_seeds_can_show() -> None:
    limits = [compute_detectable_difference(Noise(1.0, 4.0), seeds) for seeds in (3, 10, 1000)]
    assert limits[0] > limits[1] > limits[2] > 2.8 * 2.0 - 0.01


def test_more_comparisons_need_a_larger_difference() -> None:
    assert compute_detectable_difference(Noise(1.0), 5, 10) > compute_detectable_difference(Noise(1.0), 5)


def test_required_seeds_are_those_at_which_the_effect_becomes_detectable() -> None:
    scores = np.array([[51.5, 50.2, 51.0], [50.0, 50.3, 49.7]])
    estimate = estimate_contrast(ScoreSample(scores), DIFFERENCE)
    seeds = estimate_required_seeds(estimate)
    assert seeds is not None and seeds > 3
    noise = Noise(estimate.seed_variance, estimate.example_variance)
    assert compute_detectable_difference(noise, seeds) <= estimate.effect
    assert compute_detectable_difference(noise, seeds - 1) > estimate.effect


def test_no_number_of_seeds_decides_an_effect_of_nearly_nothing() -> None:
    scores = np.array([[50.01, 51.0, 49.0], [50.0, 50.0, 50.0]])
    assert estimate_required_seeds(estimate_contrast(ScoreSample(scores), DIFFERENCE)) is None
