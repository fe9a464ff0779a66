"""When each row of a training's history was written, in a file of its own.

The history itself holds nothing of the machine, so that two equal runs write it equally to the bit.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gkd_lab.store.files import append_line, keep_lines_until, read_lines

FILE = "times.jsonl"
_RECENT = 5
"""Rows over which the present pace is taken."""

Rows = Sequence[Mapping[str, Any]]


def begin(folder: Path, step: int) -> None:
    """A process begins, or goes on, after `step`; what an earlier one noted beyond it is forgotten."""
    keep_lines_until(folder / FILE, step)
    append_line(folder / FILE, {"step": step, "time": round(time.time(), 3), "began": True})


def note(folder: Path, step: int) -> None:
    """A row of the history was written after `step`."""
    append_line(folder / FILE, {"step": step, "time": round(time.time(), 3)})


def times(folder: Path) -> list[dict[str, Any]]:
    """`{"step", "time"}` in seconds since 1970, in order; `began` where a process took up the work."""
    return read_lines(folder / FILE)


def seconds(rows: Rows) -> float:
    """Seconds at work: the time between two processes does not count."""
    return sum(spent for spent, _ in _spans(rows))


def seconds_a_step(rows: Rows) -> float | None:
    """The present pace; None before the running process has written a second time."""
    last = _last_process(rows)[-_RECENT - 1 :]
    steps = last[-1]["step"] - last[0]["step"] if last else 0
    return seconds(last) / steps if steps > 0 else None


def tokens(history: Iterable[Mapping[str, Any]], batch_size: int) -> float:
    """Completion tokens that were trained on: mean length times rows, over the steps of each row."""
    found, before = 0.0, 0
    for row in history:
        found += row.get("completion_length", 0.0) * batch_size * (row["step"] - before)
        before = row["step"]
    return found


def _spans(rows: Rows) -> Iterator[tuple[float, int]]:
    """(seconds, steps) between neighbouring rows of one process; a clock set back counts as no time."""
    for before, row in pairwise(rows):
        if not row.get("began"):
            yield max(0.0, row["time"] - before["time"]), row["step"] - before["step"]


def _last_process(rows: Rows) -> list[Mapping[str, Any]]:
    begun = [n for n, row in enumerate(rows) if row.get("began")]
    return list(rows[begun[-1] if begun else 0 :])
