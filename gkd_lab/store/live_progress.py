"""How far the work on a record is right now: a small file in its folder, which is gone when the work ends.

`status` reads it in other processes. It is no part of the record's results, so a write that fails is skipped.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gkd_lab.store.files import read_json
from gkd_lab.store.heartbeat import require_lock

PROGRESS_FILE = "progress.json"
WRITE_SECONDS = 1.0
"""Least time between two writes."""

WorkUnit = Literal["steps", "rows"]


@dataclass(frozen=True)
class LiveProgress:
    """Work that a process does on a record: `done` of `total` steps or rows."""

    work: str
    """`distillation`, `SFT`, or the name of an evaluation."""
    unit: WorkUnit
    done: int
    total: int
    seconds_left: float | None
    """At the pace of this process so far; None before its first step."""


@contextmanager
def log_live_progress(
    folders: Sequence[Path], work: str, unit: WorkUnit, total: int, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Write the progress of the block into each folder; yield a function to call with the units done so far.

    done: Those that an earlier process did. The files are written at once and at most once a second. Raises
    LockLost, and touches no file, once another process has taken over a folder.
    """
    started, last_write = time.time(), 0.0

    def update(count: int) -> None:
        """Write the units done so far, unless the last write was just now."""
        nonlocal last_write
        now = time.time()
        if now - last_write < WRITE_SECONDS:
            return
        last_write = now
        pace = (now - started) / (count - done) if count > done else None
        left = None if pace is None else round(pace * (total - count), 1)
        content = {"work": work, "unit": unit, "done": count, "total": total, "seconds_left": left}
        for folder in folders:
            _write(folder, json.dumps(content))

    update(done)
    try:
        yield update
    finally:
        for folder in folders:
            with suppress(OSError):  # LockLost is one: another owner's file stays
                require_lock(folder)
                (folder / PROGRESS_FILE).unlink(missing_ok=True)


def _write(folder: Path, content: str) -> None:
    """Replace a folder's progress file; a full or missing file system is no reason to stop the work."""
    require_lock(folder)
    unfinished = folder / f".{PROGRESS_FILE}.{os.getpid()}.part"
    with suppress(OSError):
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(folder / PROGRESS_FILE)


def read_live_progress(folder: Path) -> LiveProgress | None:
    """Return the progress in a record's folder; None without one. Ask only while a process holds its lock."""
    content = read_json(folder / PROGRESS_FILE)
    try:
        return None if content is None else LiveProgress(**content)
    except TypeError:
        return None  # of another version
