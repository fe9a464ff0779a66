"""Scores of an evaluation computed anew from what was written then: no model, no torch."""

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
    """Scores of one evaluation before and after."""

    scores_before: MetricScores
    scores_after: MetricScores
    prediction_count: int


def rescore_evaluation(
    part: EvaluationRecord, metrics: Sequence[str], scorer: Scorer | None = None
) -> RescoredEvaluation:
    """Compute `metrics` from the stored predictions of a finished evaluation and store them.

    Scores that are not named stay. Files whose content would be the same are left as they are. Raises
    DamagedPredictions, and ValueError for a metric that these predictions cannot be judged by. The caller
    holds the record's lock.
    """
    rows = read_predictions(part)
    found, lines = score_predictions(metrics, [parse_prediction(row) for row in rows], scorer)
    before = part.read_scores()
    after = {**before, **found}
    rescored = [
        {**row, "scores": {**row["scores"], **line["scores"]}} for row, line in zip(rows, lines, strict=True)
    ]
    if rescored != rows:
        write_json_lines(part.folder / "predictions.jsonl", rescored)
    if after != before:
        write_json(part.folder / "scores.json", after)
    return RescoredEvaluation(before, after, len(rows))
