"""Records whose predictions are what the test says and whose scores are really computed from them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gkd_lab.config import Cell, Evaluation
from gkd_lab.metrics.scored_predictions import Prediction, score_predictions
from gkd_lab.statistics.bootstrap import ExampleStatistics
from gkd_lab.store import Record, Store

PredictionRows = Sequence[tuple[str, str, str]]
"""(prompt, prediction, reference), in order."""


def build_mean_statistics(values: Sequence[float]) -> ExampleStatistics:
    """A sample of a metric that is the mean of these."""
    return ExampleStatistics(np.array(values, dtype=float).reshape(-1, 1))


def write_predictions(
    record: Record, evaluation: Evaluation, written: PredictionRows, samples: int = 1
) -> None:
    """One evaluation, `samples` texts in a row for each prompt."""
    predictions = [
        Prediction(prompt, text, (reference,), len(text.split()), True, n % samples)
        for n, (prompt, text, reference) in enumerate(written)
    ]
    scores, rows = score_predictions(evaluation.metrics, predictions)
    record.get_evaluation(evaluation).write_results(evaluation, rows, scores, rows=len(rows))


def write_cell_record(store: Store, cell: Cell, written: PredictionRows) -> Record:
    """A finished cell with its first evaluation."""
    record = store.get_record(cell)
    record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    write_predictions(record, cell.evaluations[0], written)  # type: ignore[arg-type]
    record.finish(steps=1)
    return record


def write_reference_record(store: Store, cell: Cell, role: str, written: PredictionRows) -> Record:
    """The finished start or teacher of a cell."""
    model = cell.training.start if role == "start" else cell.training.teacher
    record = store.get_artifact(cell.scale, role, model)
    record.write_spec(model, role=role)
    write_predictions(record, cell.evaluations[0], written)  # type: ignore[arg-type]
    record.finish()
    return record


def get_predictions_path(record: Record, cell: Cell) -> Path:
    """The file of what it wrote."""
    return record.get_evaluation(cell.evaluations[0]).folder / "predictions.jsonl"
