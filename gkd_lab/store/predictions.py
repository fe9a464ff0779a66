"""Read stored predictions whole, or raise an error that names the damaged line: nothing is scored in part."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gkd_lab.metrics.scored_predictions import parse_prediction
from gkd_lab.store.record import DamagedRecord, EvaluationRecord

PredictionRow = dict[str, Any]


class DamagedPredictions(DamagedRecord):
    """Predictions that are missing, cut short or malformed."""


def read_predictions(evaluation_record: EvaluationRecord) -> list[PredictionRow]:
    """Return all rows of a finished evaluation's predictions.jsonl. DamagedPredictions: missing, damaged."""
    path = evaluation_record.folder / "predictions.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DamagedPredictions(f"{path} is missing") from error
    rows = [_parse_prediction_row(path, number, line) for number, line in enumerate(lines, 1) if line]
    written_count = evaluation_record.read_status().get("rows")
    if not rows or written_count not in (None, len(rows)):
        remaining = f"{len(rows)} of {written_count or 'its'} predictions are left"
        raise DamagedPredictions(f"{path} is cut short: {remaining}")
    return rows


def group_by_prompt(rows: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Return a list of row positions per prompt; a row with sample 0, or without, begins a new prompt."""
    groups: list[list[int]] = []
    for position, row in enumerate(rows):
        if row.get("sample", 0) == 0:
            groups.append([])
        groups[-1].append(position)
    return groups


def _parse_prediction_row(path: Path, number: int, line: bytes) -> PredictionRow:
    """Return a line's row as a checked dictionary. DamagedPredictions with file, line number and reason."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        row = None
    if not isinstance(row, dict):
        excerpt = line[:60].decode("utf-8", "backslashreplace")
        raise DamagedPredictions(f"{path}:{number}: expected a JSON object, got {excerpt!r}")
    try:
        parse_prediction(row)
    except ValueError as error:
        raise DamagedPredictions(f"{path}:{number}: {error}") from error
    if not isinstance(row.get("scores"), dict):
        raise DamagedPredictions(f"{path}:{number}: field 'scores' must be dict, got {row.get('scores')!r}")
    return row
