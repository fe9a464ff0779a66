"""Wide results table as a data frame; provenance and file formats of long and wide tables."""

import io
import json
from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd

from gkd_lab.config import Grid
from gkd_lab.store import Store
from gkd_lab.tables.formats import encode_json, encode_markdown
from gkd_lab.tables.rows import TableRow, build_wide_rows, list_extra_axes

TableFormat = Literal["csv", "json", "parquet", "md"]
TABLE_FORMATS: tuple[TableFormat, ...] = ("csv", "json", "parquet", "md")


def build_wide_table(grid: Grid, store: Store) -> pd.DataFrame:
    """Build the wide results table: a row per reference model, then a row per cell, as `build_wide_rows`."""
    rows = build_wide_rows(grid, store)
    frame = pd.DataFrame(rows)
    for column in ("seed", *list_extra_axes(grid)):
        frame[column] = convert_integers([row[column] for row in rows])
    return frame.astype({"lmbda": "float64", "beta": "float64"})


def convert_integers(values: Sequence[Any]) -> Any:
    """Return integers, None allowed, as an Int64 array, where pandas would make floats; else `values`."""
    is_integer = all(value is None or type(value) is int for value in values)
    return pd.array(values, dtype="Int64") if is_integer else values


_PROVENANCE_FIELDS = (
    *("gkd_lab", "code", "commit", "changed", "python", "packages", "machine", "device", "threads"),
)


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
    if format == "csv":
        return _encode_csv(frame)
    if format == "parquet":
        return _encode_parquet(frame)
    rows = list_table_rows(frame)
    return encode_json(rows) if format == "json" else encode_markdown(rows)


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
