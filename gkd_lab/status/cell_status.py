"""Progress of one cell: its state, owner, last logged row, pace and error, read from its record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_lab.config import Cell
from gkd_lab.store import EvaluationRecord, Record, State
from gkd_lab.store.cell_state import StoredState, compute_cell_state, get_error_line, require_metrics
from gkd_lab.store.files import read_last_json_line
from gkd_lab.store.index import RecordFacts, RecordIndex
from gkd_lab.store.lock import read_owner
from gkd_lab.store.timing import count_completion_tokens, estimate_seconds_per_step

_STATUS_KEYS = ("state", "steps", "seconds", "tokens", "shared_by", "device")
_ROW_KEYS = ("step", "loss", "on_policy")
_EVALUATION_FILES = ("status.json", "scores.json")


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
    """Of the training, at its recent pace; None where no process works on it."""
    error: str | None
    """Last line of the first error."""
    error_file: Path | None
    """File with the traceback."""
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
    error, error_file = _find_failure(facts, record, cell)
    return CellProgress(
        state=state.whole,
        owner=_format_owner(record) if state.is_running else None,
        error=error,
        error_file=error_file,
        training_status=facts["status"],
        **(_summarize_finished(facts) if training else _summarize_running(record, cell, state.is_running)),
    )


def _collect_record_facts(record: Record, cell: Cell) -> RecordFacts:
    """Read what the index stores: status, last logged row, errors, states, scored metrics."""
    status, evaluations = record.read_status(), _list_evaluations(record, cell)
    evaluation_statuses = [evaluation.read_status() for evaluation in evaluations]
    row = read_last_json_line(record.metrics_file) if status else {}
    return {
        "status": {name: status[name] for name in _STATUS_KEYS if name in status},
        "row": {name: row[name] for name in _ROW_KEYS if name in row},
        "errors": [get_error_line(status), *map(get_error_line, evaluation_statuses)],
        "states": [evaluation_status.get("state") for evaluation_status in evaluation_statuses],
        "scores": [list(evaluation.read_scores()) for evaluation in evaluations],
    }


def _find_failure(facts: RecordFacts, record: Record, cell: Cell) -> tuple[str, Path] | tuple[None, None]:
    """Return (last line of the first error, file with its traceback), or (None, None)."""
    for error, part in zip(facts["errors"], [record, *_list_evaluations(record, cell)], strict=True):
        if error is not None:
            return error, part.status_file
    return None, None


def _list_evaluations(record: Record, cell: Cell) -> list[EvaluationRecord]:
    """Return the record of each evaluation that the cell requests; it may not exist yet."""
    return [record.get_evaluation(evaluation) for evaluation in cell.evaluations]


def _format_owner(record: Record) -> str | None:
    """Return `host:pid` of the process that holds the record's lock; None if unknown."""
    owner = read_owner(record.folder)
    return None if not owner else f"{owner.get('host')}:{owner.get('pid')}"


def _summarize_finished(facts: RecordFacts) -> dict[str, Any]:
    """Return step, loss, on_policy and speed of an ended training; seconds_left is None."""
    status, row = facts["status"], facts["row"]
    seconds = status.get("seconds")
    return {
        "step": int(status.get("steps") or row.get("step", 0)),
        "loss": row.get("loss"),
        "on_policy": row.get("on_policy"),
        "tokens_per_second": status["tokens"] / seconds if seconds and "tokens" in status else None,
        "seconds_left": None,
    }


def _summarize_running(record: Record, cell: Cell, is_running: bool) -> dict[str, Any]:
    """Return step, loss, on_policy, speed and seconds_left of a training that has not ended.

    Speed and time left are None where no process works on it.
    """
    history = record.read_history() if is_running or record.steps_folder.exists() else []
    last_row = history[-1] if history else {}
    step = int(last_row.get("step", 0))
    step_seconds = estimate_seconds_per_step(record.read_step_times()) if is_running else None
    step_tokens = count_completion_tokens(history, cell.training.batch_size) / step if step else 0.0
    return {
        "step": step,
        "loss": last_row.get("loss"),
        "on_policy": last_row.get("on_policy"),
        "tokens_per_second": step_tokens / step_seconds if step_seconds else None,
        "seconds_left": None if step_seconds is None else step_seconds * (cell.training.steps - step),
    }
