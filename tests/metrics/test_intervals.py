"""Bootstrap intervals: their width, their ends, and that they repeat."""

import re

import numpy as np
import pytest
import sacrebleu

from gkd_lab.metrics import MetricInput, score
from gkd_lab.metrics.intervals import (
    bootstrap_mean_interval,
    bootstrap_mean_intervals,
    compute_interval,
)
from gkd_lab.metrics.sacrebleu_metrics import bootstrap_sacrebleu_interval


def test_the_interval_of_a_share_has_binomial_width() -> None:
    low, high = bootstrap_mean_interval([100.0] * 60 + [0.0] * 140, resamples=4000)
    # 30 +- 1.96 * sqrt(0.3 * 0.7 / 200) * 100
    assert low == pytest.approx(30 - 6.35, abs=0.6)
    assert high == pytest.approx(30 + 6.35, abs=0.6)


def test_equal_examples_have_width_0_and_a_seed_repeats() -> None:
    assert bootstrap_mean_interval([7.0] * 5) == (7.0, 7.0)
    values = [float(i % 7) for i in range(100)]
    assert bootstrap_mean_interval(values) == bootstrap_mean_interval(values)
    assert bootstrap_mean_interval(values, seed=1) != bootstrap_mean_interval(values, seed=2)


def test_drawing_in_many_chunks_covers_every_resample() -> None:
    low, high = bootstrap_mean_interval([0.0, 1.0] * 150_000, resamples=40)
    assert 0.495 < low < 0.5 < high < 0.505


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(0,\)"):
        bootstrap_mean_interval([])


def test_intervals_of_many_cells_equal_those_of_each_cell() -> None:
    values = np.random.default_rng(0).uniform(0, 100, size=(40, 77))
    together = bootstrap_mean_intervals(values, resamples=300)
    assert together.tolist() == [list(bootstrap_mean_interval(row, resamples=300)) for row in values.tolist()]
    assert len(np.unique(together)) == together.size


def test_cells_see_the_same_draws() -> None:
    """So a constant distance between two cells is that between the ends of their intervals."""
    values = np.random.default_rng(0).uniform(0, 50, size=(1, 60))
    low, high = bootstrap_mean_intervals(np.concatenate([values, values + 7])).T
    assert low[1] - low[0] == pytest.approx(7, abs=1e-8)
    assert high[1] - high[0] == pytest.approx(7, abs=1e-8)


def test_each_resample_draws_as_many_examples_with_replacement() -> None:
    from gkd_lab.metrics.intervals import _draw_count_matrix

    counts = _draw_count_matrix(30, 2000, 0, 0)
    assert counts.shape == (2000, 30)
    assert (counts.sum(axis=1) == 30).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(30), abs=0.1)
    assert counts.var() == pytest.approx(29 / 30, abs=0.02)  # of a binomial with 30 draws at 1/30


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cells, examples"):
        bootstrap_mean_intervals(np.zeros(shape))


PREDICTIONS = [
    "the cat sat on the mat",
    "a dog ran home quickly today",
    "we eat bread at noon",
] * 20
REFERENCES = [
    ["the cat sat on a mat"],
    ["the dog ran home quickly"],
    ["they ate bread at noon"],
] * 20


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_a_corpus_interval_contains_the_corpus_score(metric: str) -> None:
    value = score(metric, PREDICTIONS, REFERENCES).value
    low, high = bootstrap_sacrebleu_interval(metric, MetricInput(PREDICTIONS, REFERENCES), resamples=200)
    assert 0 < low < value < high < 100
    assert (low + high) / 2 == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_a_corpus_interval_is_sacrebleus(metric: str) -> None:
    sacrebleu_metric = {"bleu": sacrebleu.BLEU(), "chrf": sacrebleu.CHRF()}[metric]
    streams = [[texts[0] for texts in REFERENCES]]
    scored = sacrebleu_metric.corpus_score(PREDICTIONS, streams, n_bootstrap=300)
    low, high = bootstrap_sacrebleu_interval(metric, MetricInput(PREDICTIONS, REFERENCES), resamples=300)
    signature = str(sacrebleu_metric.get_signature())
    printed = re.search(r"± ([0-9.]+)", scored.format(width=6, signature=signature))
    assert printed is not None
    assert (high - low) / 2 == pytest.approx(float(printed[1]), abs=1e-5)


def test_corpus_scores_accept_varying_numbers_of_references() -> None:
    references = [[*texts, "another way to say it"] for texts in REFERENCES[:30]] + REFERENCES[30:]
    low, high = bootstrap_sacrebleu_interval("bleu", MetricInput(PREDICTIONS, references), resamples=100)
    assert 0 < low < high <= 100


def test_a_corpus_without_a_match_has_score_0_and_width_0() -> None:
    assert bootstrap_sacrebleu_interval("chrf", MetricInput(["x"] * 4, [["y"]] * 4), resamples=50) == (
        0.0,
        0.0,
    )


def test_the_metric_selects_its_interval() -> None:
    per_example = [0.0, 100.0] * 30
    assert compute_interval("accuracy", PREDICTIONS, REFERENCES, per_example) == bootstrap_mean_interval(
        per_example
    )
    bleu = compute_interval("bleu", PREDICTIONS, REFERENCES, per_example)
    assert bleu == bootstrap_sacrebleu_interval("bleu", MetricInput(PREDICTIONS, REFERENCES))


def test_samples_of_one_prompt_are_drawn_together() -> None:
    per_example = [0.0, 100.0, 100.0, 100.0] * 15
    drawn = compute_interval("accuracy", PREDICTIONS, REFERENCES, per_example, samples_per_prompt=2)
    assert drawn == bootstrap_mean_interval([50.0, 100.0] * 15)
    assert compute_interval("bleu", PREDICTIONS, REFERENCES, per_example, samples_per_prompt=2) is None


def test_chrf_with_resamples_that_score_0_has_an_interval() -> None:
    predictions = ["a b c d e", "q", "q"]
    references = [("a b c d e f",), ("g h i j",), ("k l m",)]
    ends = compute_interval("chrf", predictions, references, [50.0, 0.0, 0.0])
    assert ends is not None
    low, high = ends
    assert 0 <= low < high <= 100
