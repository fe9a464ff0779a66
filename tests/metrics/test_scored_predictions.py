"""The verdict on an evaluation: rates beside scores, several texts a prompt, reading back what was stored."""

import json
from dataclasses import replace

import pytest

from gkd_lab.metrics import METRICS, Scorer, score
from gkd_lab.metrics.intervals import bootstrap_mean_interval
from gkd_lab.metrics.score import CLASSIFICATION_METRICS
from gkd_lab.metrics.scored_predictions import Prediction, parse_prediction, score_predictions

SOLUTIONS = ["2+3=5 #### 5", "#### 6", "I do not know", ""]


def written(texts: list[str], samples: int = 1) -> list[Prediction]:
    """Texts for the prompts p0, p1 ...; every fourth was cut at its limit."""
    return [
        Prediction(f"p{n // samples}", text, ("#### 5",), 3 + n, n % 4 != 3, n % samples)
        for n, text in enumerate(texts)
    ]


def test_scores_include_lengths_end_rates_and_failure_rates() -> None:
    scores, _ = score_predictions(["accuracy", "accuracy_flexible"], written(SOLUTIONS))
    assert scores["accuracy"]["value"] == scores["accuracy_flexible"]["value"] == 25
    assert scores["extraction_failure_rate"] == {"value": 0.5}
    assert scores["flexible_extraction_failure_rate"] == {"value": 0.5}
    assert scores["empty_prediction_rate"] == {"value": 0.25}
    assert scores["mean_length"] == {"value": 4.5}
    assert (scores["eos_rate"], scores["truncated"]) == ({"value": 0.75}, {"value": 0.25})


def test_a_stored_row_is_parsed_as_its_prediction() -> None:
    for predictions in (written(SOLUTIONS), written(SOLUTIONS, samples=2)):
        _, rows = score_predictions(["accuracy"], predictions)
        assert [parse_prediction(json.loads(json.dumps(row))) for row in rows] == predictions


def test_only_rows_of_several_samples_have_a_sample_number() -> None:
    _, rows = score_predictions(["accuracy"], written(SOLUTIONS))
    assert list(rows[0]) == ["prompt", "prediction", "references", "tokens", "ended", "scores"]
    _, rows = score_predictions(["accuracy"], written(SOLUTIONS, samples=2))
    assert [row["sample"] for row in rows] == [0, 1, 0, 1]


def test_a_row_with_a_missing_or_invalid_field_is_refused() -> None:
    row = {"prompt": "p", "prediction": "t", "references": ["r"], "tokens": 1}
    with pytest.raises(ValueError, match=r"'ended'; .*prompt, prediction, ref"):
        parse_prediction(row)
    with pytest.raises(ValueError, match=r"'references' .*list.* 'r'"):
        parse_prediction({**row, "ended": True, "references": "r"})


def test_with_several_samples_prompts_are_drawn_and_corpus_scores_have_no_interval() -> None:
    predictions = written([*["#### 5"] * 40, *["#### 6"] * 40], samples=4)
    scores, _ = score_predictions(["accuracy", "bleu", "self_bleu"], predictions)
    assert scores["accuracy"]["n"] == 80
    drawn = scores["accuracy"]["low"], scores["accuracy"]["high"]
    assert drawn == bootstrap_mean_interval([100.0] * 10 + [0.0] * 10)
    as_if_independent = bootstrap_mean_interval([100.0] * 40 + [0.0] * 40)
    assert drawn[1] - drawn[0] > 1.5 * (as_if_independent[1] - as_if_independent[0])
    assert "low" not in scores["bleu"]
    assert scores["self_bleu"]["value"] == scores["self_bleu"]["low"]


def test_two_prompts_with_equal_text_stay_separate() -> None:
    twice = [
        replace(prediction, prompt="same")
        for prediction in written(["a b c d"] * 2 + ["e f g h"] * 2, samples=2)
    ]
    assert score_predictions(["self_bleu"], twice)[0]["self_bleu"]["value"] == pytest.approx(100)


def test_a_prompt_with_a_missing_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 to 2 of one prompt"):
        score_predictions(["accuracy"], written(SOLUTIONS, samples=2)[:3])


def test_a_shared_scorer_gives_the_scores_of_separate_ones() -> None:
    of_labels = ("label_accuracy", "f1_macro", "matthews")
    others = ("self_bleu", *CLASSIFICATION_METRICS)
    metrics = [*(metric for metric in METRICS if metric not in others), *of_labels]
    cells = [written(SOLUTIONS), written(SOLUTIONS[::-1]), written(["a running dog", "#### 5", "x", "x"])]
    scorer = Scorer()
    together = [score_predictions(metrics, cell, scorer) for cell in cells]
    assert together == [score_predictions(metrics, cell) for cell in cells]
    assert together[0] != together[1]


def test_equal_pairs_are_scored_once_and_equal_references_tokenized_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rouge_score import rouge_scorer, tokenize

    read: list[str] = []
    scored: list[tuple[str, str]] = []
    tokens, pair = tokenize.tokenize, rouge_scorer.RougeScorer.score

    def counted_tokens(text: str, stemmer: object) -> list[str]:
        read.append(text)
        return tokens(text, stemmer)  # type: ignore[no-any-return]

    def counted_pair(self: object, target: str, prediction: str) -> object:
        scored.append((target, prediction))
        return pair(self, target, prediction)

    monkeypatch.setattr(tokenize, "tokenize", counted_tokens)
    monkeypatch.setattr(rouge_scorer.RougeScorer, "score", counted_pair)
    scorer = Scorer()
    for texts in (["one dog", "two cats"], ["one dog", "no cats"], ["one dog", "two cats"]):
        scorer.score_many(["rouge1_stem", "rougeL_stem"], texts, [["a dog"], ["some cats"]])
    assert sorted(read) == ["a dog", "no cats", "one dog", "some cats", "two cats"]
    assert len(scored) == len(set(scored)) == 3


def test_stemming_is_another_metric_with_its_own_signature() -> None:
    plain, stemmed = (score(name, ["running dogs"], [["run dog"]]) for name in ("rouge1", "rouge1_stem"))
    assert (plain.value, stemmed.value) == (0, 100)
    assert "|stem:no|" in plain.signature
    assert stemmed.signature == plain.signature.replace("stem:no", "stem:yes")
    assert score("rouge1", ["running dogs"], [["run dog"]], use_stemmer=True) == stemmed
