"""Convert a wide results table, as older versions stored it, to the long form.

Only this module learns values from names of columns. It goes when the tables in `analysis/tables` have been
made anew.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gkd_lab.config import Evaluation, Grid
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA
from gkd_lab.config.settings import METHODS
from gkd_lab.metrics import METRICS
from gkd_lab.store import Store
from gkd_lab.tables.cell_facts import FACT_COLUMNS
from gkd_lab.tables.long_table import (
    AXIS_COLUMNS,
    ScoreBlock,
    describe_model,
    join_rows,
    list_origins,
    read_evaluation_settings,
    rename_axes,
)
from gkd_lab.tables.results import ModelRole, TableModel, list_models, name_evaluations
from gkd_lab.tables.rows import TableRow, list_requested_metrics
from gkd_lab.tables.table import list_table_rows

_EVALUATION_NAME = re.compile(r"(greedy|sample|beam)([\d.]+)?.*?(?:@(\w+))?")
_FIRST_AXIS, _AFTER_AXES = "seed", "status"
"""Columns of the wide form between which its axes stand."""

ModelsByKey = Mapping[tuple[ModelRole, str], TableModel]
"""(role, fingerprint) -> model of the grid."""


def convert_wide_table(frame: pd.DataFrame, grid: Grid | None = None) -> pd.DataFrame:
    """Return the long form of a wide table, whose nested columns are decoded.

    Settings that the table lacks come from the models of `grid` with the same fingerprint. Of a model that
    it does not have they come from the table's columns, or are null.
    """
    columns = list(frame.columns)
    axes = columns[columns.index(_FIRST_AXIS) + 1 : columns.index(_AFTER_AXES)]
    models = [] if grid is None else list_models(grid, Store(Path()))
    models_by_key = {(model.role, model.fingerprint): model for model in models}
    rows = list_table_rows(frame)
    model_rows = [_describe_row(row, axes, frame.attrs.get("scale"), models_by_key, grid) for row in rows]
    metrics = _list_metrics(frame)
    scored = _find_scored_metrics(rows, metrics)
    blocks = [
        block
        for number, row in enumerate(rows)
        for block in _list_blocks(number, row, metrics, scored, models_by_key.get((row["role"], row["cell"])))
    ]
    long = join_rows(model_rows, blocks, axes)
    long.attrs = {**frame.attrs, **long.attrs}
    return long


# ---- models ----


def _describe_row(
    row: TableRow, axes: Sequence[str], scale: str | None, models: ModelsByKey, grid: Grid | None
) -> dict[str, Any]:
    """Return a model's columns of the long form: those of its grid, replaced by those that the table has."""
    model = models.get((row["role"], row["cell"]))
    settings = _guess_settings(row) if grid is None or model is None else describe_model(grid, model)
    columns = (
        "cell",
        "role",
        "task",
        "seed",
        "lmbda",
        "beta",
        "start_cell",
        "teacher_cell",
        "status",
        "error",
    )
    return {
        **settings,
        **{AXIS_COLUMNS.get(axis, axis): row[axis] for axis in axes if axis != "divergence"},
        **{name: row.get(name) for name in columns},
        "scale": scale,
        "stands_for": rename_axes(row["stands_for"]),
    }


def _guess_settings(row: TableRow) -> dict[str, Any]:
    """Return student, teacher, divergence and facts of a model without a specification; None if not known.

    The method tells the loss and the text, the axes `alpha` and `anchor` the reward, the student's name
    self-distillation; without a divergence, a beta means JSD.
    """
    unknown: dict[str, Any] = dict.fromkeys(("student", "teacher", "divergence", *FACT_COLUMNS))
    if row["role"] != "cell":
        return unknown
    method = METHODS.get(str(row.get("method")), {})
    divergence = "jsd" if row["beta"] is not None else " or ".join(NAMES_WITHOUT_BETA)
    alpha = row.get("alpha", method.get("alpha"))
    has_teacher_text = "text" in method or row.get("source") == "teacher"
    return {
        **unknown,
        "divergence": method.get("type") or row.get("divergence") or method.get("divergence") or divergence,
        "text": "teacher" if has_teacher_text else "data",
        "reward": alpha is not None and alpha < 1,
        "distillation_share": alpha if alpha is not None and alpha < 1 else None,
        "anchor": row.get("anchor", method.get("anchor")),
        "self_distillation": row.get("student") in ("teacher", "xl"),
    }


# ---- scores ----


def _list_metrics(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Return evaluation -> its metrics, from the columns `<evaluation>/<metric>`, in their order."""
    metrics: dict[str, list[str]] = {}
    for column in frame.columns:
        evaluation, slash, metric = column.partition("/")
        if slash and not metric.endswith((".low", ".high")):
            metrics.setdefault(evaluation, []).append(metric)
    return metrics


def _find_scored_metrics(
    rows: Sequence[TableRow], metrics: Mapping[str, Sequence[str]]
) -> set[tuple[str, str, str]]:
    """Return (task, evaluation, metric) of every score that some model has."""
    return {
        (row["task"], evaluation, metric)
        for row in rows
        for evaluation, names in metrics.items()
        for metric in names
        if row[f"{evaluation}/{metric}"] is not None
    }


def _list_blocks(
    number: int,
    row: TableRow,
    metrics: Mapping[str, Sequence[str]],
    scored: set[tuple[str, str, str]],
    model: TableModel | None,
) -> Iterator[ScoreBlock]:
    """Yield a block of scores for each evaluation of a row."""
    evaluations: Sequence[AnyEvaluation] = () if model is None else model.evaluations
    names = name_evaluations(evaluations)
    by_name = {names[evaluation.folder]: evaluation for evaluation in evaluations}
    for name, state in (row["evaluations"] or {}).items():
        evaluation = by_name.get(name)
        if evaluation is not None:
            requested = list_requested_metrics(evaluation, is_first=evaluation is evaluations[0])
            settings = read_evaluation_settings(evaluation)
        else:
            settings = _parse_evaluation_name(name)
            is_requested = not by_name and settings
            possible = [metric for metric in metrics.get(name, ()) if (row["task"], name, metric) in scored]
            requested = tuple(metric for metric in possible if is_requested and metric in METRICS)
        scores = _collect_scores(row, name, metrics.get(name, ()), evaluation)
        is_added = evaluation is None and not requested
        yield ScoreBlock(number, name, settings, state, *list_origins(requested, scores, is_added), scores)


def _parse_evaluation_name(name: str) -> dict[str, Any]:
    """Return decoding, temperature and split that a name such as `sample0.5x8@validation` tells.

    Nothing for the name of an lm-eval task.
    """
    parts = _EVALUATION_NAME.fullmatch(name)
    if parts is None:
        return {}
    temperature = float(parts[2]) if parts[1] == "sample" and parts[2] else None
    return {"decoding": parts[1], "temperature": temperature, "split": parts[3] or "test"}


def _collect_scores(
    row: TableRow, name: str, metrics: Sequence[str], evaluation: AnyEvaluation | None
) -> dict[str, dict[str, Any]]:
    """Return metric -> score of one evaluation of a row; `n` is what its specification says."""
    count = None
    if isinstance(evaluation, Evaluation) and evaluation.examples is not None:
        count = evaluation.examples * (evaluation.samples or 1)
    details = {detail: row.get(f"{name}.{detail}") for detail in ("lm_eval", "task_hash")}
    scores = {}
    for metric in metrics:
        column = f"{name}/{metric}"
        if row[column] is not None:
            bounds = {end: row.get(f"{column}.{end}") for end in ("low", "high")}
            number = count if metric in METRICS else None
            scores[metric] = {"value": row[column], **bounds, "n": number, **details}
    return scores
