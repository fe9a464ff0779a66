"""Classification metrics by hand, by scikit-learn and scipy, and by the statistics of resamples."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from gkd_lab.metrics import METRICS, MetricInput, score, score_many
from gkd_lab.metrics.classifier_metrics import correlate, score_labels
from gkd_lab.metrics.intervals import compute_interval
from gkd_lab.metrics.score import CLASSIFICATION_METRICS, CORRELATION_METRICS, LABEL_METRICS
from gkd_lab.tables.example_statistics import build_example_statistics

# Hits 3 of 5. Label a: 1 hit, predicted 2, there 2. b: 1 hit, predicted 2, there 1. c: 1, 1, 2.
PREDICTED, TRUE = list("aabbc"), list("acbac")


def draw_labels(labels, count, seed):
    random = np.random.default_rng(seed)
    true = random.integers(labels, size=count)
    predicted = np.where(random.random(count) < 0.6, true, random.integers(labels, size=count))
    return predicted, true


def build_inputs(predicted, true):
    return MetricInput([str(label) for label in predicted], [[str(label)] for label in true])


def score_by_statistics(metric, inputs):
    statistics = METRICS[metric].compute_statistics(inputs)
    return statistics.compute_score(statistics.per_example.sum(0).tolist())


def test_hand_computed_values_of_three_labels():
    inputs = build_inputs(PREDICTED, TRUE)
    # Matthews: (3 * 5 - (2*2 + 2*1 + 1*2)) / sqrt(25 - 9) / sqrt(25 - 9)
    expected = {"accuracy": 3 / 5, "f1_macro": (2 / 4 + 2 / 3 + 2 / 3) / 3, "matthews": 7 / 16}
    for rule, value in expected.items():
        assert score_labels(rule, PREDICTED, TRUE) == pytest.approx(value)
        metric = "label_accuracy" if rule == "accuracy" else rule
        assert score_by_statistics(metric, inputs) == pytest.approx(100 * value)


def test_binary_f1_scores_the_last_label_or_the_given_one():
    predicted, true = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    assert score_labels("f1_binary", predicted, true) == pytest.approx(2 * 2 / 6)
    assert score_labels("f1_binary", predicted, true, positive=0) == pytest.approx(2 * 1 / 4)
    with pytest.raises(ValueError, match=r" 3: a, b, c; .*f1_macro"):
        score_labels("f1_binary", PREDICTED, TRUE)


@pytest.mark.parametrize("metric", CLASSIFICATION_METRICS)
@pytest.mark.parametrize("labels", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_statistics_give_the_score_of_the_library(metric, labels, seed):
    predicted, true = draw_labels(2 if metric == "f1_binary" else labels, 200, seed)
    inputs = build_inputs(predicted, true)
    expected = METRICS[metric].compute_score(inputs).value
    assert score_by_statistics(metric, inputs) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("metric", [name for name in CLASSIFICATION_METRICS if name != "spearman"])
def test_statistics_of_a_resample_give_the_score_of_its_texts(metric):
    """Spearman is left out: its ranks are those among all texts."""
    predicted, true = draw_labels(2 if metric == "f1_binary" else 4, 60, 3)
    statistics = METRICS[metric].compute_statistics(build_inputs(predicted, true))
    for seed in range(5):
        drawn = np.random.default_rng(seed).integers(60, size=60)
        expected = METRICS[metric].compute_score(build_inputs(predicted[drawn], true[drawn])).value
        summed = statistics.per_example[drawn].sum(0).tolist()
        assert statistics.compute_score(summed) == pytest.approx(expected, abs=1e-10)


def test_a_label_that_is_only_predicted_counts_in_macro_f1():
    predicted, true = ["a", "b", "c"], ["a", "b", "b"]
    expected = f1_score(true, predicted, average="macro", zero_division=0)
    assert score_labels("f1_macro", predicted, true) == pytest.approx(expected)
    by_statistics = score_by_statistics("f1_macro", build_inputs(predicted, true))
    assert by_statistics == pytest.approx(100 * expected)


def test_a_constant_side_has_correlation_0():
    assert score_labels("matthews", [1, 1, 1], [0, 1, 1]) == 0.0
    for metric, x, y in (
        ("pearson", [0.1, 0.1, 0.1], [0.3, 0.2, 0.1]),
        ("spearman", [2.0, 1.0, 3.0], [5.0, 5.0, 5.0]),
    ):
        assert correlate(metric, x, y) == 0.0
        inputs = build_inputs(x, y)
        assert METRICS[metric].compute_score(inputs).per_example == [0.0] * 3
        assert score_by_statistics(metric, inputs) == 0.0
    assert score_by_statistics("matthews", build_inputs([1, 1, 1], [0, 1, 1])) == 0.0


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_correlations_equal_scipys(offset):
    random = np.random.default_rng(0)
    y = random.normal(size=300) + offset
    x = np.round(y + random.normal(size=300), 1)  # with ties
    for metric, library, tolerance in (("pearson", pearsonr, 1e-9), ("spearman", spearmanr, 1e-12)):
        expected = library(x, y).statistic
        assert correlate(metric, x, y) == pytest.approx(expected, abs=tolerance)
        by_statistics = score_by_statistics(metric, build_inputs(x.tolist(), y.tolist()))
        assert by_statistics / 100 == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("metric", LABEL_METRICS)
def test_texts_score_100_times_the_score_of_their_labels(metric):
    predicted, true = draw_labels(2, 60, 1)
    texts, references = [f"l{n}" for n in predicted], [[f"l{n}"] for n in true]
    scored = score(metric, texts, references)
    assert scored.value == pytest.approx(100 * score_labels(metric.removeprefix("label_"), predicted, true))
    assert scored.per_example == [100.0 * (a == b) for a, b in zip(predicted, true, strict=True)]
    assert scored.signature == f"{metric}|rule:gkd-lab-classification-1"


def test_tags_are_counted_one_by_one():
    texts, references = ["O NAME O", "CITY"], [["O NAME CITY"], ["O"]]
    scores = score_many(["tag_accuracy", "tag_f1_macro"], texts, references)
    assert scores["tag_accuracy"].value == pytest.approx(50.0)
    flat = (["O", "NAME", "CITY", "O"], ["O", "NAME", "O", "CITY"])
    assert scores["tag_f1_macro"].value == pytest.approx(100 * f1_score(*flat, average="macro"))
    assert scores["tag_accuracy"].per_example == pytest.approx([200 / 3, 0.0])
    with pytest.raises(ValueError, match="1 predicted and 2 true"):
        score("tag_accuracy", ["O"], [["O O"]])


@pytest.mark.parametrize("metric", CORRELATION_METRICS)
def test_the_mean_over_examples_is_the_correlation(metric):
    random = np.random.default_rng(3)
    y = random.normal(size=50)
    x = y + random.normal(size=50)
    texts, references = [repr(float(v)) for v in x], [[repr(float(v))] for v in y]
    scored = score(metric, texts, references)
    assert scored.value == pytest.approx(np.mean(scored.per_example))
    assert scored.value == pytest.approx(100 * correlate(metric, x, y))


def test_correlations_need_two_finite_numbers_per_side():
    with pytest.raises(ValueError, match=r"predictions: .*'good'"):
        score("pearson", ["good", "1"], [["1"], ["2"]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        correlate("pearson", [float("nan"), 1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="1 predictions and 1 references"):
        correlate("pearson", [1.0], [1.0])


def test_a_prediction_equal_to_any_reference_is_right():
    assert score("label_accuracy", ["b"], [["a", "b"]]).value == 100.0


@pytest.mark.parametrize("metric", ["f1_macro", "matthews", "pearson"])
def test_an_interval_is_the_percentiles_of_resampled_scores(metric):
    predicted, true = draw_labels(3, 40, 5)
    inputs = build_inputs(predicted, true)
    low, high = compute_interval(metric, inputs.predictions, inputs.references, [0.0] * 40)
    rule = {
        "f1_macro": lambda a, b: f1_score(b, a, average="macro", zero_division=0),
        "matthews": lambda a, b: matthews_corrcoef(b, a),
        "pearson": lambda a, b: pearsonr(a, b).statistic,
    }[metric]
    random = np.random.default_rng(9)
    picks = random.integers(40, size=(1000, 40))
    expected = 100 * np.percentile([rule(predicted[p], true[p]) for p in picks], [2.5, 97.5])
    assert [low, high] == pytest.approx(expected.tolist(), abs=3.0)


def test_example_statistics_have_the_score_of_the_texts():
    predicted, true = draw_labels(3, 40, 5)
    rows = [{"prediction": str(a), "references": [str(b)]} for a, b in zip(predicted, true, strict=True)]
    for metric in ("label_accuracy", "f1_macro", "matthews", "pearson", "spearman"):
        expected = score(metric, [r["prediction"] for r in rows], [r["references"] for r in rows])
        sample = build_example_statistics(metric, rows, expected.per_example)
        assert sample.score == pytest.approx(expected.value)
        assert sample.select_examples(range(20)).score != sample.score
