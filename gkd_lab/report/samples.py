"""Predictions side by side, failures and provenance for the HTML report."""

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd

from gkd_lab.config import Cell, Grid
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.store import EvaluationRecord, Record, Store
from gkd_lab.store.files import read_json
from gkd_lab.tables.failure_causes import group_failures, join_names, list_failures, name_group
from gkd_lab.tables.loss_labels import divergence_label
from gkd_lab.tables.rows import get_primary_metric

MAX_CHARACTERS = 1500
"""Characters of a text that a report shows."""


def get_evaluations_by_role(
    store: Store, cell: Cell, evaluation: AnyEvaluation
) -> dict[str, EvaluationRecord]:
    """Map `start`, `cell` and `teacher` to that model's record of this evaluation."""
    records = {
        "start": store.get_artifact(cell.scale, "start", cell.training.start),
        "cell": store.get_record(cell),
        "teacher": store.get_artifact(cell.scale, "teacher", cell.training.teacher),
    }
    return {role: record.get_evaluation(evaluation) for role, record in records.items()}


def find_best_cell(grid: Grid, scores: pd.DataFrame) -> Cell | None:
    """Return the one cell (seeds apart) with the highest of one task's scores, the first if tied, or None."""
    scored = scores[(scores["role"] == "cell") & scores["value"].notna()]
    if scored.empty:
        return None
    fingerprint = scored["cell"].iloc[int(scored["value"].argmax())]
    return next(cell for cell in grid.cells if cell.fingerprint == fingerprint)


def select_samples(store: Store, cell: Cell, count: int = 10) -> list[dict[str, Any]]:
    """Return at most `count` examples, evenly spaced, as dicts with the completion of each role."""
    evaluation, metric = get_primary_metric(cell)
    evaluations = get_evaluations_by_role(store, cell, evaluation)
    predictions = {role: record.read_prediction_rows() for role, record in evaluations.items()}
    total = len(predictions["cell"])
    indices = range(total) if total <= count else (i * total // count for i in range(count))
    return [_build_sample(predictions, index, metric) for index in indices]


def _build_sample(predictions: dict[str, list[dict[str, Any]]], index: int, metric: str) -> dict[str, Any]:
    """Build one example's dict: number from 1, prompt, references, and text and score per role.

    A role's text is None where its predictions have another prompt there.
    """
    example = predictions["cell"][index]
    outputs = {}
    for role, rows in predictions.items():
        has_prompt = index < len(rows) and rows[index].get("prompt") == example.get("prompt")
        row = rows[index] if has_prompt else {}
        outputs[role] = {
            "text": shorten_text(row["prediction"]) if row else None,
            "score": row.get("scores", {}).get(metric),
            "ended": row.get("ended", True),
        }
    return {
        "number": index + 1,
        "prompt": shorten_text(example.get("prompt", "")),
        "references": [shorten_text(text) for text in example.get("references", [])],
        "outputs": outputs,
    }


def shorten_text(text: str) -> str:
    """Cut a text to `MAX_CHARACTERS` and append how many characters were left out."""
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]} ... ({left_out} more characters)"


def list_failure_groups(grid: Grid, store: Store) -> list[dict[str, str]]:
    """Return a dict per cause of failures: name of what failed, folders, error, traceback of the first."""
    labels = {record.folder: name for name, record, _ in _list_records(grid, store)}
    groups = []
    for group in group_failures(list_failures(grid, store)):
        folder = group[0].file.parent
        label = labels.get(folder) or labels.get(folder.parents[1]) if len(group) == 1 else None
        folders = [str(failure.file.parent.relative_to(store.root)) for failure in group]
        groups.append(
            {
                "name": label or name_group(group),
                "folder": join_names(folders),
                "error": group[0].reason,
                "traceback": str((read_json(group[0].file) or {}).get("traceback", "")),
            }
        )
    return groups


def summarize_provenance(grid: Grid, store: Store) -> list[tuple[str, str]]:
    """Return (field, distinct values joined by `; `) over all records, first the time range."""
    values: dict[str, dict[str, None]] = {}
    times: list[str] = []
    for _, record, _ in _list_records(grid, store):
        provenance = read_json(record.folder / "provenance.json") or {}
        times += [provenance.pop("time")] if "time" in provenance else []
        provenance.pop("spent", None)  # of each cell another one; the table has it
        for name, value in provenance.items():
            values.setdefault(name, {})[_format_fact(value)] = None
    recorded = [("recorded", f"{min(times)} to {max(times)}")] if times else []
    return [*recorded, *((name.replace("_", " "), "; ".join(texts)) for name, texts in values.items())]


def _list_records(grid: Grid, store: Store) -> Iterator[tuple[str, Record, tuple[AnyEvaluation, ...]]]:
    """Yield (name to show, record, its evaluations) of each reference model once and each cell."""
    listed = set()
    for cell in grid.cells:
        for role, model in (("start", cell.training.start), ("teacher", cell.training.teacher)):
            if (role, model.fingerprint) not in listed:
                listed.add((role, model.fingerprint))
                record = store.get_artifact(grid.scale, role, model)
                yield f"{cell.task}, {role} {model.model.name}", record, cell.evaluations
        divergence = (
            divergence_label(None, cell.divergence).lower() if cell.beta is None else f"β = {cell.beta:g}"
        )
        name = f"{cell.task}, λ = {cell.lmbda:g}, {divergence}, seed {cell.seed}"
        yield name, store.get_record(cell), cell.evaluations


def _format_fact(value: Any) -> str:
    """Format a provenance value in one line: a dict as `key value, ...`, one within it in brackets."""
    if isinstance(value, dict):
        texts = {name: _format_fact(item) for name, item in value.items()}
        return ", ".join(
            f"{name} ({texts[name]})" if isinstance(item, dict) else f"{name} {texts[name]}"
            for name, item in value.items()
        )
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)
