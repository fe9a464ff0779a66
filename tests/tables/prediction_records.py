"""Write records with given predictions and the scores that follow from them."""

from collections.abc import Sequence
from pathlib import Path

from gkd_lab.config import Cell, Evaluation
from gkd_lab.metrics.scored_predictions import Prediction, score_predictions
from gkd_lab.store import Record, Store

PredictionRows = Sequence[tuple[str, str, str]]
"""(prompt, prediction, reference), in order."""


def write_predictions(
    record: Record, evaluation: Evaluation, predictions: PredictionRows, samples: int = 1
) -> None:
    """Write one evaluation; each prompt has `samples` texts in a row."""
    parsed = [
        Prediction(prompt, text, (reference,), len(text.split()), True, n % samples)
        for n, (prompt, text, reference) in enumerate(predictions)
    ]
    scores, rows = score_predictions(evaluation.metrics, parsed)
    record.get_evaluation(evaluation).write_results(evaluation, rows, scores, rows=len(rows))


def write_cell_record(store: Store, cell: Cell, predictions: PredictionRows) -> Record:
    """Write a finished cell with its first evaluation."""
    record = store.get_record(cell)
    record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    write_predictions(record, cell.evaluations[0], predictions)  # type: ignore[arg-type]
    record.finish(steps=1)
    return record


def write_reference_record(store: Store, cell: Cell, role: str, predictions: PredictionRows) -> Record:
    """Write the finished start or teacher of a cell."""
    model = cell.training.start if role == "start" else cell.training.teacher
    record = store.get_artifact(cell.scale, role, model)
    record.write_spec(model, role=role)
    write_predictions(record, cell.evaluations[0], predictions)  # type: ignore[arg-type]
    record.finish()
    return record


def get_predictions_path(record: Record, cell: Cell) -> Path:
    """Return the predictions file of a record's first evaluation."""
    return record.get_evaluation(cell.evaluations[0]).folder / "predictions.jsonl"
