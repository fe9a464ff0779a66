"""Rescoring computes the named metrics from stored predictions, and refuses damaged ones."""

import json
from pathlib import Path

import pytest

from gkd_lab.config import Evaluation
from gkd_lab.metrics.scored_predictions import Prediction, score_predictions
from gkd_lab.store import EvaluationRecord
from gkd_lab.store.predictions import DamagedPredictions, group_by_prompt, read_predictions
from gkd_lab.store.rescore import rescore_evaluation

GREEDY = Evaluation(decoding="greedy", split="test", max_output_tokens=8, metrics=("exact_match",))
WRITTEN = [("a b", "a b"), ("c d", "c e"), ("f\u2028g", "f g")]


@pytest.fixture
def evaluation_record(tmp_path: Path) -> EvaluationRecord:
    evaluation_record = EvaluationRecord(tmp_path / "evaluations" / GREEDY.folder)
    predictions = [
        Prediction(f"{n}?", text, (reference,), 2, True) for n, (text, reference) in enumerate(WRITTEN)
    ]
    scores, rows = score_predictions(GREEDY.metrics, predictions)
    evaluation_record.write_results(
        GREEDY, [{**row, "more": 1} for row in rows], scores, rows=3, seconds_of_decoding=1.5
    )
    return evaluation_record


def read_files(evaluation_record: EvaluationRecord) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in evaluation_record.folder.iterdir()}


def test_named_metric_is_added_and_others_stay(evaluation_record: EvaluationRecord) -> None:
    before = read_files(evaluation_record)
    rescored = rescore_evaluation(evaluation_record, ["rouge1"])
    assert rescored.prediction_count == 3
    assert rescored.scores_before == json.loads(before["scores.json"])
    after = evaluation_record.read_scores()
    assert rescored.scores_after == after
    assert after["exact_match"] == rescored.scores_before["exact_match"]
    assert after["rouge1"]["signature"].startswith("rouge1|")
    for row in read_predictions(evaluation_record):
        assert set(row["scores"]) == {"exact_match", "rouge1"}
        assert row["more"] == 1
    assert read_files(evaluation_record)["status.json"] == before["status.json"]


def test_changed_metric_replaces_only_its_own_scores(evaluation_record: EvaluationRecord) -> None:
    original = read_files(evaluation_record)
    scores = evaluation_record.read_scores()
    scores["exact_match"] |= {"value": 1.0, "signature": "an older rule"}
    (evaluation_record.folder / "scores.json").write_text(json.dumps({**scores, "other": {"value": 7.0}}))
    rescore_evaluation(evaluation_record, ["exact_match"])
    after = evaluation_record.read_scores()
    assert after.pop("other") == {"value": 7.0}
    assert after == json.loads(original["scores.json"])


def test_unchanged_files_are_not_written(evaluation_record: EvaluationRecord) -> None:
    times = {path: path.stat().st_mtime_ns for path in evaluation_record.folder.iterdir()}
    rescore_evaluation(evaluation_record, ["exact_match"])
    assert {path: path.stat().st_mtime_ns for path in evaluation_record.folder.iterdir()} == times


DAMAGE = {
    '{"prompt": "0': r"predictions\.jsonl:2: expected a JSON object, got '\{\"prompt\": \"0'",
    "[1]": r"predictions\.jsonl:2: expected a JSON object",
    '{"prompt": "?"}': r"predictions\.jsonl:2: no field 'prediction'",
    '{"prompt": 1, "prediction": "", "references": [], "tokens": 1, "ended": true}': "field 'prompt' must be",
    '{"prompt": "", "prediction": "", "references": ["a"], "tokens": 1, "ended": true}': "field 'scores'",
    "\\xff": r"predictions\.jsonl:2: expected a JSON object",
}


@pytest.mark.parametrize(("line", "expected"), DAMAGE.items())
def test_damaged_line_is_named_and_files_stay(
    line: str, expected: str, evaluation_record: EvaluationRecord
) -> None:
    path = evaluation_record.folder / "predictions.jsonl"
    first, _, last = path.read_bytes().split(b"\n")[:3]
    path.write_bytes(b"\n".join([first, line.encode().replace(b"\\xff", b"\xff"), last, b""]))
    before = read_files(evaluation_record)
    with pytest.raises(DamagedPredictions, match=expected):
        rescore_evaluation(evaluation_record, ["rouge1"])
    assert read_files(evaluation_record) == before


def test_truncated_or_missing_predictions_are_not_scored(evaluation_record: EvaluationRecord) -> None:
    path = evaluation_record.folder / "predictions.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(DamagedPredictions, match="1 of 3 predictions"):
        rescore_evaluation(evaluation_record, ["rouge1"])
    path.write_bytes(b"")
    with pytest.raises(DamagedPredictions, match="0 of 3"):
        read_predictions(evaluation_record)
    path.unlink()
    with pytest.raises(DamagedPredictions, match=r"predictions\.jsonl is missing"):
        read_predictions(evaluation_record)


def test_texts_are_grouped_by_prompt() -> None:
    assert group_by_prompt([{}, {}, {"sample": 0}, {"sample": 1}, {"sample": 0}]) == [[0], [1], [2, 3], [4]]
