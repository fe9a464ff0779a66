"""Columns of real rows under other names than the task's: what the user stated, checked, and rows renamed."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from gkd_lab.config.artifact_specs import ColumnNames
from gkd_lab.tasks.task import Task

TEACHER_COLUMN = "teacher"
RawRow = Mapping[str, Any]


def resolve_columns(task: Task, kind: str, columns: ColumnNames | None) -> ColumnNames | None:
    """Return the columns that differ from the task's own, or None if none does.

    kind: Kind of the data source. Raises ValueError for made rows, and for a column that the task lacks.
    """
    stated = {} if columns is None else columns.model_dump(exclude_none=True)
    if not stated:
        return None
    if kind == "made":
        raise ValueError(f"data.columns: made rows of {task.name} have no other names; leave it out")
    names = _list_columns(task)
    unknown = [role for role in stated if role not in names]
    if unknown:
        raise ValueError(
            f"data.columns.{unknown[0]}: rows of {task.name} have no such column; valid: {', '.join(names)}"
        )
    changes = {role: name for role, name in stated.items() if name != names[role]}
    return ColumnNames(**changes) if changes else None


def build_column_reader(task: Task, columns: ColumnNames | None) -> Callable[[RawRow], RawRow]:
    """Return the function raw row -> raw row with the task's own names for its columns.

    It raises ValueError for a column that is not there. Without columns it returns the row unchanged.
    """
    if columns is None:
        return lambda raw: raw
    names = _list_columns(task)
    stated = columns.model_dump(exclude_none=True)
    sources = {name for path in stated.values() for name in (path, path.split(".")[0])}

    def rename_columns(raw: RawRow) -> RawRow:
        """Return a raw row whose stated columns have the task's names."""
        values = {names[role]: _read_column(raw, role, path) for role, path in stated.items()}
        return {**{name: value for name, value in raw.items() if name not in sources}, **values}

    return rename_columns


def list_text_columns(task: Task, columns: ColumnNames | None) -> list[str] | None:
    """Return the task's names of the columns that must not be blank; None: all text columns of a row."""
    if columns is None and task.reads_other_columns:
        return None
    return [task.columns["prompt"], task.columns["target"]]


def describe_columns(task: Task, columns: ColumnNames | None) -> str:
    """Return ` (answer is the column 'solution')` and the like; "" without columns."""
    stated = {} if columns is None else columns.model_dump(exclude_none=True)
    names = _list_columns(task)
    pairs = ", ".join(f"{names[role]} is the column {path!r}" for role, path in stated.items())
    return f" ({pairs})" if pairs else ""


def _list_columns(task: Task) -> dict[str, str]:
    """Return role -> name of each column that a task reads."""
    return {**task.columns, "teacher": TEACHER_COLUMN}


def _read_column(raw: RawRow, role: str, path: str) -> Any:
    """Return the value of a column, or of a field `column.field`; ValueError if it is absent."""
    if path in raw:
        return raw[path]
    column, _, field = path.partition(".")
    inner = raw.get(column)
    if field and isinstance(inner, Mapping) and field in inner:
        return inner[field]
    choices = [str(name) for name in raw]
    choices += [f"{name}.{key}" for name, value in raw.items() if isinstance(value, Mapping) for key in value]
    nearest = difflib.get_close_matches(path, choices, n=1, cutoff=0.5)
    hint = f" did you mean {nearest[0]!r}?" if nearest else ""
    valid = ", ".join(choices) or "none"
    raise ValueError(f"data.columns.{role}: no column {path!r};{hint} the columns there are: {valid}")
