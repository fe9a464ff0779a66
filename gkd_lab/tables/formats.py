"""JSON and Markdown forms of a table, from its rows, without pandas, which takes long to load."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from gkd_lab.tables.rows import TableRow


def encode_json(rows: Iterable[TableRow]) -> bytes:
    """Encode as JSON bytes: an array of objects, one row a line; missing is null, columns stay nested."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    return ("[\n" + ",\n".join(map(encode, rows)) + "\n]\n").encode()


_HIDDEN_COLUMNS = ("evaluations", "start_cell", "teacher_cell")
"""Columns that Markdown leaves out."""


def encode_markdown(rows: Sequence[TableRow]) -> bytes:
    """Encode as a GitHub table in bytes: rounded, no empty columns, intervals beside their scores."""
    columns = list(rows[0]) if rows else []
    names = [
        name
        for name in columns
        if not _is_redundant_column(name, columns) and any(row[name] is not None for row in rows)
    ]
    body = [[_format_score(row, name) for name in names] for row in rows]
    return f"{tabulate(body, names, tablefmt='github', disable_numparse=True)}\n".encode()


def _is_redundant_column(name: str, columns: Sequence[str]) -> bool:
    """Return whether Markdown omits a column: bounds, lm-eval details, long form of a score."""
    is_detail = name.endswith((".low", ".high", ".lm_eval", ".task_hash"))
    has_short_form = "/" in name and name.split("/", 1)[1] in columns
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
