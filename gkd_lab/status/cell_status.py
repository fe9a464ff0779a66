"""How far one cell is: its state, who works on it, its last row, its pace, and why it failed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_lab.config import Cell
from gkd_lab.store import EvaluationRecord, Record, State
from gkd_lab.store.cell_state import Verdict, compute_cell_state, get_error_line, judge_evaluation
from gkd_lab.store.index import RecordFacts, RecordIndex
from gkd_lab.store.lock import read_owner
from gkd_lab.store.files import read_last_json_line
from gkd_lab.store.timing import count_completion_tokens, estimate_seconds_per_step

_STATUS_KEYS = ("state", "steps", "seconds", "tokens", "shared_by", "device")
_ROW_KEYS = ("step", "loss", "on_policy")


@dataclass(frozen=True)
class CellProgress:
    """What the files of a cell's record say."""

    state: State
    owner: str | None
    """`host:pid` of the process that works on it."""
    step: int
    loss: float | None
    on_policy: float | None
    tokens_per_second: float | None
    """Completion tokens that this cell was trained on, by the clock: of a pack, each has its own."""
    seconds_left: float | None
    """Of the training, at the present pace; None where no process is at it."""
    error: str | None
    """The last line of the first error."""
    error_file: Path | None
    """The file that holds the traceback."""
    training_status: RecordFacts
    """Of the training, `state`, `seconds`, `shared_by`, `device` and more, where it is done."""


def read_progress(record: Record, cell: Cell, index: RecordIndex) -> CellProgress:
    """Read a cell's record; of a finished one through the index."""
    names = [evaluation.folder for evaluation in cell.evaluations]
    files = ["status.json", *(f"evaluations/{n}/{file}" for n in names for file in _EVALUATION_FILES)]
    facts = index.get_facts(cell.folder, files, lambda: _collect_record_facts(record, cell))
    training: Verdict = facts["status"].get("state")
    verdicts = [
        judge_evaluation(verdict, evaluation.metrics, metrics)
        for evaluation, verdict, metrics in zip(
            cell.evaluations, facts["verdicts"], facts["scores"], strict=True
        )
    ]
    state = compute_cell_state(training, verdicts, record.is_locked)
    error, log = _find_failure(facts, record, cell)
    return CellProgress(
        state=state.whole,
        owner=_format_owner(record) if state.is_running else None,
        error=error,
        error_file=log,
        training_status=facts["status"],
        **(_summarize_finished(facts) if training else _summarize_running(record, cell, state.is_running)),
    )


_EVALUATION_FILES = ("status.json", "scores.json")


def _collect_record_facts(record: Record, cell: Cell) -> RecordFacts:
    status, evaluations = record.read_status(), _list_evaluations(record, cell)
    evaluation_statuses = [evaluation.read_status() for evaluation in evaluations]
    row = read_last_json_line(record.metrics_file) if status else {}
    return {
        "status": {name: status[name] for name in _STATUS_KEYS if name in status},
        "row": {name: row[name] for name in _ROW_KEYS if name in row},
        "errors": [get_error_line(status), *map(get_error_line, evaluation_statuses)],
        "verdicts": [evaluation_status.get("state") for evaluation_status in evaluation_statuses],
        "scores": [list(evaluation.read_scores()) for evaluation in evaluations],
    }


def _find_failure(facts: RecordFacts, record: Record, cell: Cell) -> tuple[str, Path] | tuple[None, None]:
    for n, error in enumerate(facts["errors"]):
        if error is not None:
            return error, [record, *_list_evaluations(record, cell)][n].status_file
    return None, None


def _list_evaluations(record: Record, cell: Cell) -> list[EvaluationRecord]:
    return [record.get_evaluation(evaluation) for evaluation in cell.evaluations]


def _format_owner(record: Record) -> str | None:
    facts = read_owner(record.folder)
    return None if not facts else f"{facts.get('host')}:{facts.get('pid')}"


def _summarize_finished(facts: RecordFacts) -> dict[str, Any]:
    status, row = facts["status"], facts["row"]
    clock = status.get("seconds")
    return {
        "step": int(status.get("steps") or row.get("step", 0)),
        "loss": row.get("loss"),
        "on_policy": row.get("on_policy"),
        "tokens_per_second": status["tokens"] / clock if clock and "tokens" in status else None,
        "seconds_left": None,
    }


def _summarize_running(record: Record, cell: Cell, is_running: bool) -> dict[str, Any]:
    begun = is_running or record.steps_folder.exists()
    history = record.read_history() if begun else []
    last = history[-1] if history else {}
    step = int(last.get("step", 0))
    pace = estimate_seconds_per_step(record.read_step_times()) if is_running else None
    return {
        "step": step,
        "loss": last.get("loss"),
        "on_policy": last.get("on_policy"),
        "tokens_per_second": _compute_tokens_per_step(history, cell) / pace if pace else None,
        "seconds_left": None if pace is None else pace * (cell.training.steps - step),
    }


def _compute_tokens_per_step(history: list[dict[str, Any]], cell: Cell) -> float:
    return (
        count_completion_tokens(history, cell.training.batch_size) / history[-1]["step"] if history else 0.0
    )
