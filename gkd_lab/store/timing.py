"""Times of a training: a log of when each step was written, its pace, and a clock for one process.

The times are in a file of their own, because two equal runs write `metrics.jsonl` equally to the bit.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gkd_lab.store.files import (
    append_json_line,
    drop_lines_beyond_step,
    read_json_lines,
    read_last_json_lines,
)

TIMES_FILE = "times.jsonl"
_RECENT_ROWS = 5
"""Rows over which the present pace is averaged."""

TimeRows = Sequence[Mapping[str, Any]]


class UsageMeter:
    """Clock time and processor time of this process since the meter was created."""

    def __init__(self) -> None:
        self.start_seconds, self.start_cpu_seconds = time.monotonic(), time.process_time()

    def read_usage(self) -> dict[str, float]:
        """Return the `seconds` by the clock and `cpu_seconds` of this process since the meter was created."""
        return {
            "seconds": round(time.monotonic() - self.start_seconds, 3),
            "cpu_seconds": round(time.process_time() - self.start_cpu_seconds, 3),
        }


def log_process_start(folder: Path, step: int) -> None:
    """Append a row `began` at `step` to `times.jsonl`, after dropping the rows of later steps."""
    drop_lines_beyond_step(folder / TIMES_FILE, step)
    append_json_line(folder / TIMES_FILE, {"step": step, "time": round(time.time(), 3), "began": True})


def log_step_time(folder: Path, step: int) -> None:
    """Append a row to `times.jsonl`: `step` and the present time."""
    append_json_line(folder / TIMES_FILE, {"step": step, "time": round(time.time(), 3)})


def read_step_times(folder: Path) -> list[dict[str, Any]]:
    """Return `{"step", "time"}` rows in order, in seconds since 1970; `began` marks a process's start."""
    return read_json_lines(folder / TIMES_FILE)


def sum_work_seconds(rows: TimeRows) -> float:
    """Return the total seconds that processes worked; the time between two processes does not count."""
    return sum(seconds for seconds, _ in _iterate_spans(rows))


def estimate_seconds_per_step(rows: TimeRows) -> float | None:
    """Return the latest process's mean seconds per step over its last rows; None before a second row."""
    recent_rows = _select_last_process(rows)[-_RECENT_ROWS - 1 :]
    steps = recent_rows[-1]["step"] - recent_rows[0]["step"] if recent_rows else 0
    return sum_work_seconds(recent_rows) / steps if steps > 0 else None


def read_seconds_per_step(folder: Path) -> float | None:
    """Return `estimate_seconds_per_step` of a folder's times, reading only the end of `times.jsonl`."""
    return estimate_seconds_per_step(read_last_json_lines(folder / TIMES_FILE, _RECENT_ROWS + 1))


def count_completion_tokens(
    history: Iterable[Mapping[str, Any]], batch_size: int, previous_step: int = 0
) -> float:
    """Return the total completion tokens trained on: per row mean length times batch size times steps.

    previous_step: step of the row before the first one.
    """
    tokens = 0.0
    for row in history:
        tokens += row.get("completion_length", 0.0) * batch_size * (row["step"] - previous_step)
        previous_step = row["step"]
    return tokens


def _iterate_spans(rows: TimeRows) -> Iterator[tuple[float, int]]:
    """Yield (seconds, steps) between neighbouring rows of one process; a clock set back counts as 0 s."""
    for previous_row, row in pairwise(rows):
        if not row.get("began"):
            yield max(0.0, row["time"] - previous_row["time"]), row["step"] - previous_row["step"]


def _select_last_process(rows: TimeRows) -> list[Mapping[str, Any]]:
    """Return the rows since the last start of a process; all rows if no start was logged."""
    starts = [n for n, row in enumerate(rows) if row.get("began")]
    return list(rows[starts[-1] if starts else 0 :])
