"""Scores from stored predictions: what is recomputed, what stays, and what is refused."""

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
def part(tmp_path: Path) -> EvaluationRecord:
    part = EvaluationRecord(tmp_path / "evaluations" / GREEDY.folder)
    predictions = [Prediction(f"{n}?", text, (said,), 2, True) for n, (text, said) in enumerate(WRITTEN)]
    scores, rows = score_predictions(GREEDY.metrics, predictions)
    part.write_results(GREEDY, [{**row, "more": 1} for row in rows], scores, rows=3, seconds_of_decoding=1.5)
    return part


def files(part: EvaluationRecord) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in part.folder.iterdir()}


def test_what_is_named_is_added_and_the_rest_stays(part: EvaluationRecord) -> None:
    before = files(part)
    found = rescore_evaluation(part, ["rouge1"])
    assert found.prediction_count == 3
    assert found.scores_before == json.loads(before["scores.json"])
    after = part.read_scores()
    assert found.scores_after == after
    assert after["exact_match"] == found.scores_before["exact_match"]
    assert after["rouge1"]["signature"].startswith("rouge1|")
    for row in read_predictions(part):
        assert set(row["scores"]) == {"exact_match", "rouge1"}
        assert row["more"] == 1
    assert files(part)["status.json"] == before["status.json"]


def test_a_metric_that_changed_replaces_its_own_scores_only(part: EvaluationRecord) -> None:
    honest = files(part)
    scores = part.read_scores()
    scores["exact_match"] |= {"value": 1.0, "signature": "an older rule"}
    (part.folder / "scores.json").write_text(json.dumps({**scores, "kept": {"value": 7.0}}))
    rescore_evaluation(part, ["exact_match"])
    after = part.read_scores()
    assert after.pop("kept") == {"value": 7.0}
    assert after == json.loads(honest["scores.json"])


def test_what_would_be_the_same_is_not_written(part: EvaluationRecord) -> None:
    times = {path: path.stat().st_mtime_ns for path in part.folder.iterdir()}
    rescore_evaluation(part, ["exact_match"])
    assert {path: path.stat().st_mtime_ns for path in part.folder.iterdir()} == times


DAMAGE = {
    '{"prompt": "0': r"predictions\.jsonl:2: expected a JSON object, got '\{\"prompt\": \"0'",
    "[1]": r"predictions\.jsonl:2: expected a JSON object",
    '{"prompt": "?"}': r"predictions\.jsonl:2: no field 'prediction'; the fields there are: prompt",
    '{"prompt": 1, "prediction": "", "references": [], "tokens": 1, "ended": true}': "field 'prompt' must be",
    '{"prompt": "", "prediction": "", "references": ["a"], "tokens": 1, "ended": true}': "field 'scores'",
    "\\xff": r"predictions\.jsonl:2: expected a JSON object",
}


@pytest.mark.parametrize(("line", "said"), DAMAGE.items())
def test_a_damaged_line_is_named_and_nothing_is_touched(line: str, said: str, part: EvaluationRecord) -> None:
    path = part.folder / "predictions.jsonl"
    first, _, last = path.read_bytes().split(b"\n")[:3]
    path.write_bytes(b"\n".join([first, line.encode().replace(b"\\xff", b"\xff"), last, b""]))
    before = files(part)
    with pytest.raises(DamagedPredictions, match=said):
        rescore_evaluation(part, ["rouge1"])
    assert files(part) == before


def test_predictions_that_are_cut_short_or_gone_are_not_scored_in_part(part: EvaluationRecord) -> None:
    path = part.folder / "predictions.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(DamagedPredictions, match="is cut short: 1 of 3 predictions are left"):
        rescore_evaluation(part, ["rouge1"])
    path.write_bytes(b"")
    with pytest.raises(DamagedPredictions, match="cut short: 0 of 3"):
        read_predictions(part)
    path.unlink()
    with pytest.raises(DamagedPredictions, match=r"predictions\.jsonl is missing"):
        read_predictions(part)


def test_texts_of_one_prompt_stand_together() -> None:
    assert group_by_prompt([{}, {}, {"sample": 0}, {"sample": 1}, {"sample": 0}]) == [[0], [1], [2, 3], [4]]
