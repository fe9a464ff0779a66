"""Progress of one cell: its state, owner, last logged row, pace and error, read from its record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_lab.config import Cell
from gkd_lab.store import EvaluationRecord, Record, RecordPart, State
from gkd_lab.store.cell_state import StoredState, compute_cell_state, get_error_line, require_metrics
from gkd_lab.store.index import RecordFacts, RecordIndex
from gkd_lab.store.live_progress import LiveProgress, read_live_progress
from gkd_lab.store.lock import read_owner
from gkd_lab.store.timing import count_completion_tokens

_STATUS_KEYS = ("state", "steps", "seconds", "tokens", "shared_by", "device")
_ROW_KEYS = ("step", "loss", "on_policy")
_EVALUATION_FILES = ("status.json", "scores.json")
_RECENT_ROWS = 1000
"""Rows of a running cell over which the tokens of a step are averaged: all rows of most trainings."""


@dataclass(frozen=True)
class CellProgress:
    """Progress of a cell as its record states it."""

    state: State
    owner: str | None
    """`host:pid` of the process that works on it."""
    step: int
    loss: float | None
    on_policy: float | None
    tokens_per_second: float | None
    """Completion tokens of this cell's own batches per second, in a pack too."""
    seconds_left: float | None
    """Of the training or the evaluation that runs, at its recent pace; None where no process works on it."""
    error: str | None
    """Last line of the first error."""
    error_file: Path | None
    """File with the traceback."""
    evaluation_states: tuple[State, ...]
    """State of each evaluation that the experiment asks for."""
    decoding_times: tuple[tuple[int, float] | None, ...]
    """Of each evaluation (rows, seconds of decoding for this cell); None unless it is done and says so."""
    live: LiveProgress | None
    """Work of the process that holds the lock."""
    training_status: RecordFacts
    """`state`, `seconds`, `shared_by`, `device` and more of the training, where it is done."""


def read_progress(record: Record, cell: Cell, index: RecordIndex) -> CellProgress:
    """Read a cell's progress from its record; facts of a finished one are cached in `index`."""
    folders = [evaluation.folder for evaluation in cell.evaluations]
    files = [f"evaluations/{folder}/{name}" for folder in folders for name in _EVALUATION_FILES]
    facts = index.get_facts(cell.folder, ["status.json", *files], lambda: _collect_record_facts(record, cell))
    training: StoredState = facts["status"].get("state")
    stored_states = [
        require_metrics(stored_state, evaluation.metrics, metrics)
        for evaluation, stored_state, metrics in zip(
            cell.evaluations, facts["states"], facts["scores"], strict=True
        )
    ]
    state = compute_cell_state(training, stored_states, record.is_locked)
    live = read_live_progress(record.folder) if state.is_running else None
    error, error_file = _find_failure(facts, record, cell)
    return CellProgress(
        state=state.whole,
        owner=_format_owner(record) if state.is_running else None,
        error=error,
        error_file=error_file,
        evaluation_states=state.evaluations,
        decoding_times=tuple(None if times is None else (times[0], times[1]) for times in facts["decoding"]),
        live=live,
        training_status=facts["status"],
        **(
            _summarize_finished(facts, live)
            if training
            else _summarize_running(record, cell, live, is_running=state.is_running)
        ),
    )


def _collect_record_facts(record: Record, cell: Cell) -> RecordFacts:
    """Read what the index stores: status, last logged row, errors, states, scored metrics."""
    status, evaluations = record.read_status(), _list_evaluations(record, cell)
    evaluation_statuses = [evaluation.read_status() for evaluation in evaluations]
    row = next(iter(record.read_recent_history(1)), {}) if status else {}
    return {
        "status": {name: status[name] for name in _STATUS_KEYS if name in status},
        "row": {name: row[name] for name in _ROW_KEYS if name in row},
        "errors": [get_error_line(status), *map(get_error_line, evaluation_statuses)],
        "states": [evaluation_status.get("state") for evaluation_status in evaluation_statuses],
        "decoding": [_get_decoding_time(evaluation_status) for evaluation_status in evaluation_statuses],
        "scores": [list(evaluation.read_scores()) for evaluation in evaluations],
    }


def _get_decoding_time(status: Mapping[str, Any]) -> list[Any] | None:
    """Return [rows, seconds] of a finished evaluation's decoding; None if its status has none."""
    rows, seconds = status.get("rows"), status.get("seconds_of_decoding")
    return [rows, seconds] if rows and seconds is not None else None


def _find_failure(facts: RecordFacts, record: Record, cell: Cell) -> tuple[str, Path] | tuple[None, None]:
    """Return (last line of the first error, file with its traceback), or (None, None)."""
    if not any(facts["errors"]):
        return None, None
    parts: list[RecordPart] = [record, *_list_evaluations(record, cell)]
    errors = zip(facts["errors"], parts, strict=True)
    return next((error, part.status_file) for error, part in errors if error is not None)


def _list_evaluations(record: Record, cell: Cell) -> list[EvaluationRecord]:
    """Return the record of each evaluation that the cell requests; it may not exist yet."""
    return [record.get_evaluation(evaluation) for evaluation in cell.evaluations]


def _format_owner(record: Record) -> str | None:
    """Return `host:pid` of the process that holds the record's lock; None if unknown."""
    owner = read_owner(record.folder)
    return None if not owner else f"{owner.get('host')}:{owner.get('pid')}"


def _summarize_finished(facts: RecordFacts, live: LiveProgress | None) -> dict[str, Any]:
    """Return step, loss, on_policy and speed of an ended training; seconds_left is of an evaluation."""
    status, row = facts["status"], facts["row"]
    seconds = status.get("seconds")
    return {
        "step": int(status.get("steps") or row.get("step", 0)),
        "loss": row.get("loss"),
        "on_policy": row.get("on_policy"),
        "tokens_per_second": status["tokens"] / seconds if seconds and "tokens" in status else None,
        "seconds_left": None if live is None else live.seconds_left,
    }


def _summarize_running(
    record: Record, cell: Cell, live: LiveProgress | None, *, is_running: bool
) -> dict[str, Any]:
    """Return step, loss, on_policy, speed and seconds_left of a training that has not ended.

    The step is the one that the process is at, if it says so, else that of the last logged row. Speed and
    time left are None where no process works on it.
    """
    is_started = is_running or record.steps_folder.exists()
    history = record.read_recent_history(_RECENT_ROWS + 1) if is_started else []
    last_row = history[-1] if history else {}
    step = max(int(last_row.get("step", 0)), 0 if live is None or live.unit != "steps" else live.done)
    step_seconds = record.read_seconds_per_step() if is_running else None
    step_tokens = _average_step_tokens(history, cell.training.batch_size)
    return {
        "step": step,
        "loss": last_row.get("loss"),
        "on_policy": last_row.get("on_policy"),
        "tokens_per_second": step_tokens / step_seconds if step_seconds else None,
        "seconds_left": _estimate_seconds_left(step_seconds, cell.training.steps - step, live),
    }


def _estimate_seconds_left(step_seconds: float | None, steps: int, live: LiveProgress | None) -> float | None:
    """Return the seconds of the steps left at the logged pace, else as the process says; None if unknown."""
    if step_seconds is not None:
        return step_seconds * steps
    return None if live is None else live.seconds_left


def _average_step_tokens(history: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """Return the mean completion tokens of a step over the last rows; 0 without a row.

    Of more rows than are averaged the first one only tells the step that the others follow.
    """
    first_step = int(history[0]["step"]) if len(history) > _RECENT_ROWS else 0
    rows = history[-_RECENT_ROWS:]
    steps = int(rows[-1].get("step", 0)) - first_step if rows else 0
    return count_completion_tokens(rows, batch_size, first_step) / steps if steps else 0.0
