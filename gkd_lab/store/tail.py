"""The last row of a history, without reading all of it."""

import json
from pathlib import Path
from typing import Any

_TAIL_BYTES = 4096
"""Bytes that hold the last row of any history of ours."""


def read_last_row(path: Path) -> dict[str, Any]:
    """The last whole JSON line of a file; `{}` where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            *whole, _ = file.read().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for line in reversed(whole):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}
