"""Records whose predictions are what the test says and whose scores are really computed from them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gkd_lab.config import Cell, Evaluation
from gkd_lab.metrics.scored_predictions import Prediction, judge
from gkd_lab.statistics.bootstrap import Sample
from gkd_lab.store import Record, Store

Written = Sequence[tuple[str, str, str]]
"""(prompt, prediction, reference), in order."""


def of_values(values: Sequence[float]) -> Sample:
    """A sample of a metric that is the mean of these."""
    return Sample(np.array(values, dtype=float).reshape(-1, 1))


def write(record: Record, evaluation: Evaluation, written: Written, samples: int = 1) -> None:
    """One evaluation, `samples` texts in a row for each prompt."""
    predictions = [
        Prediction(prompt, text, (reference,), len(text.split()), True, n % samples)
        for n, (prompt, text, reference) in enumerate(written)
    ]
    scores, rows = judge(evaluation.metrics, predictions)
    record.evaluation(evaluation).write(evaluation, rows, scores, rows=len(rows))


def cell_record(store: Store, cell: Cell, written: Written) -> Record:
    """A finished cell with its first evaluation."""
    record = store.of(cell)
    record.describe(cell.training, scale=cell.scale, labels=cell.labels)
    write(record, cell.evaluations[0], written)  # type: ignore[arg-type]
    record.finish(steps=1)
    return record


def reference_record(store: Store, cell: Cell, role: str, written: Written) -> Record:
    """The finished start or teacher of a cell."""
    model = cell.training.start if role == "start" else cell.training.teacher
    record = store.artifact(cell.scale, role, model)
    record.describe(model, role=role)
    write(record, cell.evaluations[0], written)  # type: ignore[arg-type]
    record.finish()
    return record


def predictions_of(record: Record, cell: Cell) -> Path:
    """The file of what it wrote."""
    return record.evaluation(cell.evaluations[0]).folder / "predictions.jsonl"
