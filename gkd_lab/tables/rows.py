"""Table rows: one per cell and one per reference model, missing and failed ones included.

Rows are plain dictionaries, so that nothing heavy is imported.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gkd_lab.config import Cell, Grid
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.store import Store
from gkd_lab.tables.results import ModelResults, TableModel, list_models, name_evaluations, read_results

TableRow = dict[str, Any]

_LEADING_COLUMNS = ("cell", "role", "task", "lmbda", "beta", "seed")
_TRAILING_COLUMNS = ("start_cell", "teacher_cell", "stands_for", "error")
_FIXED_AXES = ("task", "lmbda", "beta", "seed")
_LM_EVAL_DETAILS = ("lm_eval", "task_hash")
"""Version and task hash of an lm-eval score: one column per evaluation."""


def build_table_rows(grid: Grid, store: Store) -> list[TableRow]:
    """Build a dict (column -> value) per SFT student, then per teacher, then per cell."""
    axes, models = list_extra_axes(grid), list_models(grid, store)
    return [
        {
            **_build_settings(model, axes),
            **_flatten_results(results),
            **(_build_cell_links(grid, model.cells[0]) if model.role == "cell" else {}),
        }
        for model, results in zip(models, read_results(models, store), strict=True)
    ]


def build_wide_rows(grid: Grid, store: Store) -> list[TableRow]:
    """Build the rows of the wide table, all with the same columns: reference models, then cells.

    Columns: `cell` (fingerprint), `role`, `task`, `lmbda`, `beta`, `seed`, the other axes, `status`,
    `evaluations`, scores as `<evaluation>/<metric>` (and `<metric>` where a cell has one evaluation) with
    `.low` and `.high`, `start_cell` and `teacher_cell` (rows to compare with), `stands_for`, `error`. Total
    variation has no `beta`: it is None in its cells. Numbers of one column are of one type.
    """
    rows = build_table_rows(grid, store)
    axes = list_extra_axes(grid)
    scores = _list_score_columns(grid, rows)
    columns = [*_LEADING_COLUMNS, *axes, "status", "evaluations", *scores, *_TRAILING_COLUMNS]
    values = [_unify_numbers([row.get(name) for row in rows], name, axes) for name in columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _unify_numbers(values: list[Any], column: str, axes: Sequence[str]) -> list[Any]:
    """Return a column's values, NaN as None, integers as floats if the column has floats.

    `lmbda` and `beta` are floats; beside None, only seeds and axes stay integers.
    """
    types = set(map(type, values))
    if types <= {int, float, type(None)}:
        is_float = float in types or column in ("lmbda", "beta")
        is_float |= type(None) in types and column not in ("seed", *axes)
        if is_float:
            return [None if value is None or value != value else float(value) for value in values]
    return values


def _list_score_columns(grid: Grid, rows: list[TableRow]) -> list[str]:
    """Return the score columns: the requested ones, then others that some row has, each once."""
    columns: dict[str, None] = {}
    for evaluations in dict.fromkeys(cell.evaluations for cell in grid.cells):
        columns.update(dict.fromkeys(list_metric_columns(evaluations)))
    other_columns = {
        *_LEADING_COLUMNS, *list_extra_axes(grid), "status", "evaluations", *_TRAILING_COLUMNS,
    }  # fmt: skip
    for row in rows:
        columns.update(dict.fromkeys(name for name in row if name not in other_columns))
    return list(columns)


def list_extra_axes(grid: Grid) -> tuple[str, ...]:
    """Return the grid's axes besides task, lmbda, beta and seed; each is a column."""
    return tuple(axis for axis in grid.axes if axis not in _FIXED_AXES)


def get_primary_metric(cell: Cell) -> tuple[AnyEvaluation, str]:
    """Return (the cell's first evaluation, name of the first metric of that evaluation)."""
    return cell.evaluations[0], list_requested_metrics(cell.evaluations[0], is_first=True)[0]


def list_metric_columns(evaluations: tuple[AnyEvaluation, ...]) -> Iterator[str]:
    """Yield the requested score columns with their `.low` and `.high`, scored yet or not.

    A cell with one evaluation has each column under the metric's name alone, too.
    """
    names = name_evaluations(evaluations)
    for evaluation in evaluations:
        for metric in list_requested_metrics(evaluation, is_first=evaluation is evaluations[0]):
            yield from _list_bound_columns(f"{names[evaluation.folder]}/{metric}")
            if len(evaluations) == 1:
                yield from _list_bound_columns(metric)


def list_requested_metrics(evaluation: AnyEvaluation, is_first: bool) -> tuple[str, ...]:
    """Return the metrics that an evaluation must have; `acc` for a cell's first one that names none."""
    return tuple(dict.fromkeys(evaluation.metrics)) or (("acc",) if is_first else ())


def _list_bound_columns(name: str) -> tuple[str, str, str]:
    """Return three column names: the score's, and the same with `.low` and `.high`."""
    return name, f"{name}.low", f"{name}.high"


def _build_settings(model: TableModel, axes: tuple[str, ...]) -> TableRow:
    """Return a row's columns up to its axes; lmbda and beta are None for a reference model."""
    settings: tuple[float | None, float | None] = (None, None)
    if model.role == "cell":
        settings = (model.cells[0].lmbda, model.cells[0].beta)
    return {
        "cell": model.fingerprint,
        "role": model.role,
        "task": model.cells[0].task,
        **dict(zip(("lmbda", "beta"), settings, strict=True)),
        "seed": model.seed,
        **{axis: find_shared_label(model, axis) for axis in axes},
    }


def find_shared_label(model: TableModel, axis: str) -> Any:
    """Return the encoded axis value that all cells of a model share; None if they differ."""
    if len(model.cells) == 1:
        return encode_axis_value(model.cells[0].labels[axis])
    values = {encode_axis_value(cell.labels[axis]) for cell in model.cells}
    return values.pop() if len(values) == 1 else None


def _build_cell_links(grid: Grid, cell: Cell) -> TableRow:
    """Return columns that tell a cell's reference models, and the grid points that it stands for."""
    points = grid.stands_for.get(cell.full_fingerprint)
    return {
        "start_cell": cell.training.start.fingerprint,
        "teacher_cell": cell.training.teacher.fingerprint,
        "stands_for": None if points is None else [dict(point) for point in points],
    }


def _flatten_results(results: ModelResults) -> TableRow:
    """Return status, state per evaluation, score columns and first error of a model."""
    has_short_names = sum(not evaluation.is_added for evaluation in results.evaluations) == 1
    scores: TableRow = {}
    for evaluation in results.evaluations:
        include_short_names = has_short_names and not evaluation.is_added
        scores.update(_flatten_scores(evaluation.scores, evaluation.name, include_short_names))
    return {
        "status": results.status,
        "evaluations": {evaluation.name: evaluation.state for evaluation in results.evaluations},
        **scores,
        "error": results.error,
    }


def _flatten_scores(
    scores: Mapping[str, Mapping[str, Any]], name: str, include_short_names: bool
) -> TableRow:
    """Return columns `<name>/<metric>`, their `.low` and `.high`, and lm-eval's details.

    With `include_short_names` each metric has columns under its name alone, too.
    """
    columns: TableRow = {}
    for metric, score in scores.items():
        for column in (f"{name}/{metric}", metric) if include_short_names else (f"{name}/{metric}",):
            columns[column] = score.get("value")
            columns.update({f"{column}.{end}": score[end] for end in ("low", "high") if end in score})
        columns.update({f"{name}.{detail}": score[detail] for detail in _LM_EVAL_DETAILS if detail in score})
    return columns


def encode_axis_value(value: Any) -> Any:
    """Return a scalar or None as it is, anything else as JSON text, so that it fits a table cell."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True, default=_dump_value)


def _dump_value(value: Any) -> Any:
    """Return an iterable as a list, a pydantic model as a dict: the `default` of json.dumps."""
    return list(value) if isinstance(value, Iterable) else value.model_dump(mode="json")
