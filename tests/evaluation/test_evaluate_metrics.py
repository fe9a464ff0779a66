"""Compare the `evaluate.Metric` classes with the plain functions, offline."""

import os
import subprocess
import sys

import pytest

from gkd_lab.metrics import METRICS, score, score_many

PREDICTIONS = ["The cat sat #### 5", "Ein Haus am See"]
REFERENCES = [["The cat sits #### 5"], ["Ein Haus am Meer", "Das Haus am See"]]


@pytest.fixture(scope="module")
def evaluate_metrics():  # type: ignore[no-untyped-def]
    from gkd_lab.evaluation import evaluate_metrics

    return evaluate_metrics


@pytest.mark.parametrize("name", [metric for metric in METRICS if metric != "self_bleu"])
def test_every_registered_metric_can_be_computed(evaluate_metrics, name: str) -> None:  # type: ignore[no-untyped-def]
    predictions, references = ["1", "2", "2"], [["1"], ["2"], ["1"]]
    result = evaluate_metrics.TextMetric([name]).compute(predictions=predictions, references=references)
    assert result[name] == pytest.approx(score(name, predictions, references).value)


@pytest.mark.parametrize("name", ["Accuracy", "AccuracyFlexible", "ExactMatch", "Rouge", "Bleu", "Chrf"])
def test_compute_equals_the_plain_functions(evaluate_metrics, name: str) -> None:  # type: ignore[no-untyped-def]
    metric = getattr(evaluate_metrics, name)()
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    expected = score_many(metric.names, PREDICTIONS, REFERENCES)
    for name, plain in expected.items():
        assert result[name] == pytest.approx(plain.value)
        assert result["signatures"][name] == plain.signature
        assert {key: result[key] for key in plain.rates} == plain.rates


def test_one_text_per_example_is_enough(evaluate_metrics) -> None:  # type: ignore[no-untyped-def]
    firsts = [texts[0] for texts in REFERENCES]
    single = evaluate_metrics.Chrf().compute(predictions=PREDICTIONS, references=firsts)
    same = evaluate_metrics.Chrf().compute(predictions=PREDICTIONS, references=[[text] for text in firsts])
    assert single == same


def test_batches_are_scored_together(evaluate_metrics) -> None:  # type: ignore[no-untyped-def]
    metric = evaluate_metrics.Bleu()
    for prediction, texts in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add_batch(predictions=[prediction], references=[texts])
    whole = evaluate_metrics.Bleu().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert metric.compute() == whole


def test_settings_reach_the_score(evaluate_metrics) -> None:  # type: ignore[no-untyped-def]
    plain, stemmed = (
        evaluate_metrics.Rouge().compute(
            predictions=["running dogs"], references=[["run dog"]], use_stemmer=stem
        )
        for stem in (False, True)
    )
    assert (plain["rouge1"], stemmed["rouge1"]) == (0, 100)


def test_self_bleu_takes_the_texts_of_each_prompt(evaluate_metrics) -> None:  # type: ignore[no-untyped-def]
    groups = [["a b c d e", "a b c d f"], ["one two three four"] * 2]
    result = evaluate_metrics.SelfBleu().compute(predictions=groups)
    texts = [text for group in groups for text in group]
    expected = score("self_bleu", texts, [[""]] * 4, prompts=[0, 0, 1, 1])
    assert result["self_bleu"] == pytest.approx(expected.value)
    assert result["signatures"] == {"self_bleu": expected.signature}


@pytest.mark.slow
def test_metrics_need_no_network() -> None:
    code = """
import socket
def refuse(*_, **__):
    raise AssertionError("the network was touched")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from gkd_lab.evaluation.evaluate_metrics import Accuracy
assert Accuracy().compute(predictions=["#### 1"], references=["#### 1"])["accuracy"] == 100
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
