"""Classification's metrics against hand-computed values and against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from gkd_lab.metrics import classifier_metrics, score_many
from gkd_lab.metrics.classifier_metric_names import LABEL_METRICS
from gkd_lab.metrics.classifier_metrics import (
    accuracy,
    compute_statistics,
    f1_binary,
    f1_macro,
    matthews,
    pearson,
    score_texts,
    spearman,
)
from gkd_lab.metrics.intervals import compute_interval
from gkd_lab.statistics.bootstrap import bootstrap_scores, build_example_statistics

# Hits 3 of 5. Label a: 1 hit, predicted 2, there 2. b: 1 hit, predicted 2, there 1. c: 1, 1, 2.
PREDICTED, TRUE = list("aabbc"), list("acbac")


def drawn(labels, count, seed):
    random = np.random.default_rng(seed)
    true = random.integers(labels, size=count)
    found = np.where(random.random(count) < 0.6, true, random.integers(labels, size=count))
    return found, true


def test_hand_computed_values_of_three_labels():
    assert accuracy(PREDICTED, TRUE) == pytest.approx(3 / 5)
    assert f1_macro(PREDICTED, TRUE) == pytest.approx((2 / 4 + 2 / 3 + 2 / 3) / 3)
    # (3 * 5 - (2*2 + 2*1 + 1*2)) / sqrt(25 - 9) / sqrt(25 - 9)
    assert matthews(PREDICTED, TRUE) == pytest.approx(7 / 16)


def test_binary_f1_is_of_the_last_label_or_of_the_one_that_is_named():
    found, true = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    assert f1_binary(found, true) == pytest.approx(2 * 2 / 6)
    assert f1_binary(found, true, positive=0) == pytest.approx(2 * 1 / 4)
    with pytest.raises(ValueError, match="two labels, and there are 3: a, b, c; choose f1_macro"):
        f1_binary(PREDICTED, TRUE)


@pytest.mark.parametrize("labels", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_label_metrics_equal_scikit_learn_s(labels, seed):
    found, true = drawn(labels, 200, seed)
    assert accuracy(found, true) == pytest.approx(accuracy_score(true, found), abs=1e-12)
    assert f1_macro(found, true) == pytest.approx(f1_score(true, found, average="macro"), abs=1e-12)
    assert matthews(found, true) == pytest.approx(matthews_corrcoef(true, found), abs=1e-12)
    if labels == 2:
        for positive in (0, 1):
            expected = f1_score(true, found, pos_label=positive)
            assert f1_binary(found, true, positive) == pytest.approx(expected, abs=1e-12)


def test_a_label_that_is_only_predicted_counts_in_the_mean():
    found, true = ["a", "b", "c"], ["a", "b", "b"]
    assert f1_macro(found, true) == pytest.approx(f1_score(true, found, average="macro", zero_division=0))


def test_a_constant_side_has_no_correlation():
    assert matthews([1, 1, 1], [0, 1, 1]) == 0.0
    assert pearson([0.1, 0.1, 0.1], [0.3, 0.2, 0.1]) == 0.0
    assert spearman([2.0, 1.0, 3.0], [5.0, 5.0, 5.0]) == 0.0


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_correlations_equal_scipy_s(offset):
    random = np.random.default_rng(0)
    y = random.normal(size=300) + offset
    x = np.round(y + random.normal(size=300), 1)  # with ties
    assert pearson(x, y) == pytest.approx(pearsonr(x, y).statistic, abs=1e-9)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("metric", LABEL_METRICS)
def test_a_score_of_texts_is_a_hundred_times_that_of_labels(metric):
    found, true = drawn(2, 60, 1)
    texts, references = [f"l{n}" for n in found], [[f"l{n}"] for n in true]
    own = getattr(classifier_metrics, metric.removeprefix("label_"))
    scored = score_many([metric], texts, references)[metric]
    assert scored.value == pytest.approx(100 * own(found, true))
    assert scored.per_example == [100.0 * (a == b) for a, b in zip(found, true, strict=True)]
    assert scored.signature.startswith(metric)


def test_tags_are_counted_one_by_one():
    texts, references = ["O NAME O", "CITY"], [["O NAME CITY"], ["O"]]
    scores = score_many(["tag_accuracy", "tag_f1_macro"], texts, references)
    assert scores["tag_accuracy"].value == pytest.approx(50.0)
    flat = (["O", "NAME", "CITY", "O"], ["O", "NAME", "O", "CITY"])
    assert scores["tag_f1_macro"].value == pytest.approx(100 * f1_score(*flat, average="macro"))
    assert score_texts("tag_accuracy", texts, references) == pytest.approx([200 / 3, 0.0])
    with pytest.raises(ValueError, match="1 predicted and 2 true ones"):
        score_many(["tag_accuracy"], ["O"], [["O O"]])


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_the_mean_over_examples_is_the_correlation(metric):
    random = np.random.default_rng(3)
    y = random.normal(size=50)
    x = y + random.normal(size=50)
    texts, references = [repr(float(v)) for v in x], [[repr(float(v))] for v in y]
    scored = score_many([metric], texts, references)[metric]
    assert scored.value == pytest.approx(np.mean(scored.per_example))
    assert scored.value == pytest.approx(100 * getattr(classifier_metrics, metric)(x, y))


def test_numbers_must_be_numbers():
    with pytest.raises(ValueError, match=r"the predictions have others: .*'good'"):
        score_many(["pearson"], ["good", "1"], [["1"], ["2"]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        pearson([float("nan"), 1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="1 predictions and 1 references"):
        pearson([1.0], [1.0])


def test_a_prediction_equal_to_any_reference_is_right():
    assert score_many(["label_accuracy"], ["b"], [["a", "b"]])["label_accuracy"].value == 100.0


@pytest.mark.parametrize("metric", ["f1_macro", "matthews", "pearson"])
def test_an_interval_is_of_the_score_of_resamples(metric):
    found, true = drawn(3, 40, 5)
    texts, references = [str(n) for n in found], [[str(n)] for n in true]
    low, high = compute_interval(metric, texts, references, score_texts(metric, texts, references))
    rule = {
        "f1_macro": lambda a, b: f1_score(b, a, average="macro", zero_division=0),
        "matthews": lambda a, b: matthews_corrcoef(b, a),
        "pearson": lambda a, b: pearsonr(a, b).statistic,
    }[metric]
    random = np.random.default_rng(9)
    picks = random.integers(40, size=(1000, 40))
    expected = 100 * np.percentile([rule(found[p], true[p]) for p in picks], [2.5, 97.5])
    assert [low, high] == pytest.approx(expected.tolist(), abs=3.0)


def test_a_sample_for_comparisons_has_the_score_as_its_value():
    found, true = drawn(3, 40, 5)
    rows = [{"prediction": str(a), "references": [str(b)]} for a, b in zip(found, true, strict=True)]
    for metric in ("label_accuracy", "f1_macro", "matthews", "pearson", "spearman"):
        expected = score_many([metric], [r["prediction"] for r in rows], [r["references"] for r in rows])
        sample = build_example_statistics(metric, rows, expected[metric].per_example)
        assert sample.score == pytest.approx(expected[metric].value)
        assert bootstrap_scores([sample], resamples=10).std() > 0


def test_statistics_of_parts_add_up():
    found, true = drawn(4, 30, 2)
    texts, references = [str(n) for n in found], [[str(n)] for n in true]
    counted, score = compute_statistics("matthews", texts, references)
    assert score(counted.sum(0).tolist()) == pytest.approx(100 * matthews_corrcoef(true, found))
