"""Recompute the scores of an evaluation from its stored predictions: no model, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gkd_lab.metrics.scored_predictions import parse_prediction, score_predictions
from gkd_lab.metrics.text_metrics import Scorer
from gkd_lab.store.files import write_json, write_json_lines
from gkd_lab.store.predictions import read_predictions
from gkd_lab.store.record import EvaluationRecord

MetricScores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RescoredEvaluation:
    """Scores of one evaluation before and after it was rescored."""

    scores_before: MetricScores
    scores_after: MetricScores
    prediction_count: int


def rescore_evaluation(
    evaluation_record: EvaluationRecord, metrics: Sequence[str], scorer: Scorer | None = None
) -> RescoredEvaluation:
    """Recompute `metrics` from stored predictions, write the scores, and return them before and after.

    Other scores stay, and a file whose content would not change is not written. The caller holds the
    record's lock. Raises DamagedPredictions, and ValueError for a metric that these predictions do not have.
    """
    rows = read_predictions(evaluation_record)
    scores, scored_rows = score_predictions(metrics, [parse_prediction(row) for row in rows], scorer)
    scores_before = evaluation_record.read_scores()
    scores_after = {**scores_before, **scores}
    rescored_rows = [
        {**row, "scores": {**row["scores"], **scored_row["scores"]}}
        for row, scored_row in zip(rows, scored_rows, strict=True)
    ]
    if rescored_rows != rows:
        write_json_lines(evaluation_record.folder / "predictions.jsonl", rescored_rows)
    if scores_after != scores_before:
        write_json(evaluation_record.folder / "scores.json", scores_after)
    return RescoredEvaluation(scores_before, scores_after, len(rows))
