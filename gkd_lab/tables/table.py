"""Results table: rows as a data frame, and its csv, json, parquet and Markdown forms."""

import io
import json
from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
from tabulate import tabulate

from gkd_lab.config import Grid
from gkd_lab.store import Store
from gkd_lab.tables.rows import TableRow, build_table_rows, list_extra_axes, list_metric_columns

TableFormat = Literal["csv", "json", "parquet", "md"]
TABLE_FORMATS: tuple[TableFormat, ...] = ("csv", "json", "parquet", "md")

_LEADING_COLUMNS = ("cell", "role", "task", "lmbda", "beta", "seed")
_TRAILING_COLUMNS = ("start_cell", "teacher_cell", "stands_for", "error")


def build_wide_table(grid: Grid, store: Store) -> pd.DataFrame:
    """Build the wide results table: a row per reference model, then a row per cell.

    Columns: `cell` (fingerprint), `role`, `task`, `lmbda`, `beta`, `seed`, the other axes, `status`,
    `evaluations`, scores as `<evaluation>/<metric>` (and `<metric>` where a cell has one evaluation) with
    `.low` and `.high`, `start_cell` and `teacher_cell` (rows to compare with), `stands_for`, `error`. Total
    variation has no `beta`: it is null in its cells.
    """
    table_rows = build_table_rows(grid, store)
    axes = list_extra_axes(grid)
    scores = _list_score_columns(grid, table_rows)
    columns = [*_LEADING_COLUMNS, *axes, "status", "evaluations", *scores, *_TRAILING_COLUMNS]
    frame = pd.DataFrame(table_rows, columns=columns)
    frame[["lmbda", "beta"]] = frame[["lmbda", "beta"]].astype("float64")
    for column in ("seed", *axes):
        frame[column] = convert_integers([row[column] for row in table_rows])
    return frame


def convert_integers(values: Sequence[Any]) -> Any:
    """Return integers, None allowed, as an Int64 array, where pandas would make floats; else `values`."""
    is_integer = all(value is None or type(value) is int for value in values)
    return pd.array(values, dtype="Int64") if is_integer else values


def _list_score_columns(grid: Grid, table_rows: list[TableRow]) -> list[str]:
    """Return the score columns: the requested ones, then others that some row has, each once."""
    columns: dict[str, None] = {}
    for evaluations in dict.fromkeys(cell.evaluations for cell in grid.cells):
        columns.update(dict.fromkeys(list_metric_columns(evaluations)))
    other_columns = {
        *_LEADING_COLUMNS, *list_extra_axes(grid), "status", "evaluations", *_TRAILING_COLUMNS,
    }  # fmt: skip
    for row in table_rows:
        columns.update(dict.fromkeys(name for name in row if name not in other_columns))
    return list(columns)


_PROVENANCE_FIELDS = ("gkd_lab", "commit", "changed", "python", "packages", "machine", "device", "threads")


def collect_table_provenance(grid: Grid, store: Store) -> dict[str, Any]:
    """Return experiment, scale and `origins`: cells per distinct code, packages and machine."""
    origins: dict[str, int] = {}
    for cell in grid.cells:
        provenance = store.get_record(cell).read_provenance()
        if provenance:
            fields = {name: provenance.get(name) for name in _PROVENANCE_FIELDS}
            origin = json.dumps(fields, sort_keys=True)
            origins[origin] = origins.get(origin, 0) + 1
    return {
        "experiment": grid.name,
        "scale": grid.scale,
        "origins": [{"cells": count, **json.loads(origin)} for origin, count in origins.items()],
    }


# ---- formats ----


def encode_table(frame: pd.DataFrame, format: TableFormat) -> bytes:
    """Encode the table as csv, json, parquet or md and return bytes; text is UTF-8.

    In csv and parquet, `evaluations` and `stands_for` are JSON text. Markdown, of the wide form only, is for
    reading: numbers are rounded and empty columns left out.
    """
    encoders = {
        "csv": _encode_csv,
        "json": _encode_json,
        "parquet": _encode_parquet,
        "md": _encode_markdown,
    }
    return encoders[format](frame)


def list_table_rows(frame: pd.DataFrame) -> list[TableRow]:
    """Return a dict (column -> value) per row, with None for every missing value (NaN, NA)."""
    columns = [
        [None if _is_missing(value) else value for value in frame[name].astype(object)]
        for name in frame.columns
    ]
    names = list(frame.columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _is_missing(value: Any) -> bool:
    """Return whether a value is None, NA or NaN."""
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _encode_csv(frame: pd.DataFrame) -> bytes:
    """Encode as CSV bytes with a header and no index; nested columns as JSON text."""
    return _encode_nested_columns(frame).to_csv(index=False).encode()


def _encode_json(frame: pd.DataFrame) -> bytes:
    """Encode as JSON bytes: an array of objects, one row a line; missing is null, columns stay nested."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in list_table_rows(frame)]
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def _encode_parquet(frame: pd.DataFrame) -> bytes:
    """Encode as Parquet bytes without index; nested columns as JSON text."""
    buffer = io.BytesIO()
    _encode_nested_columns(frame).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _encode_nested_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a copy whose `evaluations` and `stands_for` are JSON text, or None if missing."""
    flat = frame.copy()
    for column in [name for name in ("evaluations", "stands_for") if name in frame]:
        flat[column] = [
            None if _is_missing(value) else json.dumps(value, ensure_ascii=False) for value in frame[column]
        ]
    return flat


_HIDDEN_COLUMNS = ("evaluations", "start_cell", "teacher_cell")
"""Columns that Markdown leaves out."""


def _encode_markdown(frame: pd.DataFrame) -> bytes:
    """Encode as a GitHub table in bytes: rounded, no empty columns, intervals beside their scores."""
    names = [
        name
        for name in frame.columns
        if not frame[name].isna().all() and not _is_redundant_column(name, frame)
    ]
    body = [[_format_score(row, name) for name in names] for row in list_table_rows(frame)]
    return f"{tabulate(body, names, tablefmt='github', disable_numparse=True)}\n".encode()


def _is_redundant_column(name: str, frame: pd.DataFrame) -> bool:
    """Return whether Markdown omits a column: bounds, lm-eval details, long form of a score."""
    is_detail = name.endswith((".low", ".high", ".lm_eval", ".task_hash"))
    has_short_form = "/" in name and name.split("/", 1)[1] in frame.columns
    return name in _HIDDEN_COLUMNS or is_detail or has_short_form


def _format_score(row: TableRow, name: str) -> str:
    """Format a value of a row; a score with bounds as `12.3 [11.0, 13.5]`, a share with 3 digits."""
    low, high = row.get(f"{name}.low"), row.get(f"{name}.high")
    if row[name] is None or low is None or high is None:
        return _format_value(row[name])
    if 0 < max(abs(low), abs(high)) <= 1:  # a share, as lm-eval gives it
        return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"
    return f"{row[name]:.1f} [{low:.1f}, {high:.1f}]"


def _format_value(value: Any) -> str:
    """Format a Markdown cell: None empty, floats with 4 digits, dicts as `name: state`; `|` escaped."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        value = ", ".join(f"{name}: {state}" for name, state in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")
