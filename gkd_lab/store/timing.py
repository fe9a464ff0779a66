"""When each row of a training's history was written, in a file of its own.

The history itself holds nothing of the machine, so that two equal runs write it equally to the bit.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gkd_lab.store.files import append_json_line, drop_lines_beyond_step, read_json_lines

TIMES_FILE = "times.jsonl"
_RECENT_ROWS = 5
"""Rows over which the present pace is taken."""

TimeRows = Sequence[Mapping[str, Any]]


def log_process_start(folder: Path, step: int) -> None:
    """A process begins, or goes on, after `step`; what an earlier one noted beyond it is forgotten."""
    drop_lines_beyond_step(folder / TIMES_FILE, step)
    append_json_line(folder / TIMES_FILE, {"step": step, "time": round(time.time(), 3), "began": True})


def log_step_time(folder: Path, step: int) -> None:
    """A row of the history was written after `step`."""
    append_json_line(folder / TIMES_FILE, {"step": step, "time": round(time.time(), 3)})


def read_step_times(folder: Path) -> list[dict[str, Any]]:
    """`{"step", "time"}` in seconds since 1970, in order; `began` where a process took up the work."""
    return read_json_lines(folder / TIMES_FILE)


def sum_work_seconds(rows: TimeRows) -> float:
    """Seconds at work: the time between two processes does not count."""
    return sum(spent for spent, _ in _iterate_spans(rows))


def estimate_seconds_per_step(rows: TimeRows) -> float | None:
    """The present pace; None before the running process has written a second time."""
    last = _select_last_process(rows)[-_RECENT_ROWS - 1 :]
    steps = last[-1]["step"] - last[0]["step"] if last else 0
    return sum_work_seconds(last) / steps if steps > 0 else None


def count_completion_tokens(history: Iterable[Mapping[str, Any]], batch_size: int) -> float:
    """Completion tokens that were trained on: mean length times rows, over the steps of each row."""
    found, before = 0.0, 0
    for row in history:
        found += row.get("completion_length", 0.0) * batch_size * (row["step"] - before)
        before = row["step"]
    return found


def _iterate_spans(rows: TimeRows) -> Iterator[tuple[float, int]]:
    """(seconds, steps) between neighbouring rows of one process; a clock set back counts as no time."""
    for before, row in pairwise(rows):
        if not row.get("began"):
            yield max(0.0, row["time"] - before["time"]), row["step"] - before["step"]


def _select_last_process(rows: TimeRows) -> list[Mapping[str, Any]]:
    begun = [n for n, row in enumerate(rows) if row.get("began")]
    return list(rows[begun[-1] if begun else 0 :])
