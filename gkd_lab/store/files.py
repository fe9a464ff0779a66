"""Writing that survives: whole files appear by rename, lines are appended and cut back to a step."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """`path` holds either what it held before or all of `content`, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # a device or a pipe, which a rename would replace
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def quarantine_path(path: Path) -> Path | None:
    """Rename what is damaged, in place of what was set aside before; returns where it is now."""
    if not path.exists():
        return None
    place = path.with_name(f"{path.name}.damaged")
    if place.is_dir():
        shutil.rmtree(place)
    return path.replace(place)


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, by rename."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None where there is none or it is damaged (it is then made again)."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, by rename."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """One more JSON line, in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of `path`, up to the first damaged one (an interrupted write); [] without a file."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    # Not `splitlines`: text may hold U+0085 or U+2028, which JSON does not escape.
    for line in filter(None, path.read_bytes().split(b"\n")):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def drop_lines_beyond_step(path: Path, step: int) -> None:
    """Drop what was logged after `step`, so that a resumed run does not log a step twice."""
    if path.exists():
        write_json_lines(path, [row for row in read_json_lines(path) if row.get("step", 0) <= step])
