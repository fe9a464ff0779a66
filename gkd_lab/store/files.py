"""Crash-safe files: whole files appear by rename, JSON lines are appended and cut back to a step.

What changes a file checks first that this process has not lost the lock around it, and raises LockLost if so.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gkd_lab.store.heartbeat import require_lock

_BLOCK_BYTES = 1 << 16
"""Bytes that are read at once from the end of a file; a few hundred rows of a history."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file by rename, creating its folder: `path` always has its old or all of its new content."""
    require_lock(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # a device or a pipe, which a rename would replace
        return
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary_path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        require_lock(path)
        temporary_path.replace(path)
    finally:
        temporary_path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to a file by rename, in UTF-8, creating its folder."""
    write_bytes(path, text.encode())


def quarantine_path(path: Path) -> Path | None:
    """Rename a file or folder to `<name>.damaged`, over an older one; return that path, None if absent."""
    if not path.exists():
        return None
    require_lock(path)
    quarantined_path = path.with_name(f"{path.name}.damaged")
    if quarantined_path.is_dir():
        shutil.rmtree(quarantined_path)
    return path.replace(quarantined_path)


def remove_file(path: Path) -> None:
    """Remove a file; nothing happens if it is missing."""
    require_lock(path)
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and all that is in it, as far as that is possible."""
    require_lock(path)
    shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a file by rename as indented JSON; NaN is refused with ValueError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing, damaged or holds no object."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a file by rename, one JSON object per line; old rows are replaced."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row as a JSON line in a single write; the folder must exist."""
    require_lock(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return a file's rows up to the first damaged line (an interrupted write); [] without a file."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    # Not `splitlines`: text may hold U+0085 or U+2028, which JSON does not escape.
    for line in filter(None, path.read_bytes().split(b"\n")):
        row = _parse_json_object(line)
        if row is None:
            break
        rows.append(row)
    return rows


def read_last_json_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the last `count` rows that `read_json_lines` would, reading only the end of the file.

    Only a damaged line before the part that is read goes unnoticed. [] without a file.
    """
    rows: list[dict[str, Any]] = []
    for line in _iterate_lines_backwards(path):
        row = _parse_json_object(line)
        if row is None:
            rows.clear()  # what follows a damaged line does not count
            continue
        rows.append(row)
        if len(rows) == count:
            break
    return rows[::-1]


def _iterate_lines_backwards(path: Path) -> Iterator[bytes]:
    """Yield a file's lines but empty ones from the last to the first, read in blocks; none without a file."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        pieces: list[bytes] = []
        """Pieces of the line whose beginning is not read yet, from its end."""
        while position > 0:
            start = max(0, position - _BLOCK_BYTES)
            file.seek(start)
            first, *lines = file.read(position - start).split(b"\n")
            if lines:
                yield from filter(None, (b"".join((lines[-1], *reversed(pieces))), *lines[-2::-1]))
                pieces.clear()
            pieces.append(first)
            position = start
        yield from filter(None, [b"".join(reversed(pieces))])


def drop_lines_beyond_step(path: Path, step: int) -> None:
    """Rewrite a file of JSON lines without the rows after `step`, so that no step is logged twice."""
    if path.exists():
        write_json_lines(path, [row for row in read_json_lines(path) if row.get("step", 0) <= step])


def _parse_json_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line; None if it is damaged or not an object."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return row if isinstance(row, dict) else None
