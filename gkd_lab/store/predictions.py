"""Stored predictions as they were written, or an error that says what is lost: nothing is scored in part."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gkd_lab.metrics.scored_predictions import parse_prediction
from gkd_lab.store.record import DamagedRecord, EvaluationRecord

PredictionRow = dict[str, Any]


class DamagedPredictions(DamagedRecord):
    """Predictions that are gone, cut short or not as they were written."""


def read_predictions(part: EvaluationRecord) -> list[PredictionRow]:
    """All rows of a finished evaluation. Raises DamagedPredictions with file and line."""
    path = part.folder / "predictions.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DamagedPredictions(f"{path} is missing") from error
    rows = [_parse_prediction_row(path, number, line) for number, line in enumerate(lines, 1) if line]
    written = part.read_status().get("rows")
    if not rows or written not in (None, len(rows)):
        left = f"{len(rows)} of {written or 'its'} predictions are left"
        raise DamagedPredictions(f"{path} is cut short: {left}")
    return rows


def group_by_prompt(rows: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Positions of the texts of each prompt: several where several were sampled."""
    groups: list[list[int]] = []
    for position, row in enumerate(rows):
        if row.get("sample", 0) == 0:
            groups.append([])
        groups[-1].append(position)
    return groups


def _parse_prediction_row(path: Path, number: int, line: bytes) -> PredictionRow:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        row = None
    if not isinstance(row, dict):
        shown = line[:60].decode("utf-8", "backslashreplace")
        raise DamagedPredictions(f"{path}:{number}: expected a JSON object, got {shown!r}")
    try:
        parse_prediction(row)
    except ValueError as error:
        raise DamagedPredictions(f"{path}:{number}: {error}") from error
    if not isinstance(row.get("scores"), dict):
        raise DamagedPredictions(f"{path}:{number}: field 'scores' must be dict, got {row.get('scores')!r}")
    return row
