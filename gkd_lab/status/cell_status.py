"""How far one cell is: its state, who works on it, its last row, its pace, and why it failed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_lab.config import Cell
from gkd_lab.store import EvaluationRecord, Record, State, worst
from gkd_lab.store.index import Facts, Index
from gkd_lab.store.lock import owner
from gkd_lab.store.tail import last_row
from gkd_lab.store.timing import seconds_a_step, tokens

_OF_STATUS = ("state", "steps", "seconds", "tokens", "shared_by", "device")
_OF_ROW = ("step", "loss", "on_policy")


@dataclass(frozen=True)
class Standing:
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
    log: Path | None
    """The file that holds the traceback."""
    status: Facts
    """Of the training, `state`, `seconds`, `shared_by`, `device` and more, where it is done."""


def standing(record: Record, cell: Cell, index: Index) -> Standing:
    """Read a cell's record; of a finished one through the index."""
    names = [evaluation.folder for evaluation in cell.evaluations]
    files = ["status.json", *(f"evaluations/{n}/{file}" for n in names for file in _OF_PART)]
    facts = index.facts(cell.folder, files, lambda: _facts(record, cell))
    states = [_state(facts, n, cell) for n in range(len(names))]
    training: State = facts["status"].get("state", "missing")
    busy = "missing" in (training, *states) and record.is_claimed()
    unfinished: State = "running" if busy else "missing"
    whole = worst([unfinished if state == "missing" else state for state in (training, *states)])
    error, log = _failure(facts, record, cell)
    return Standing(
        state=whole,
        owner=_owner(record) if busy else None,
        error=error,
        log=log,
        status=facts["status"],
        **(_finished(facts) if training != "missing" else _under_way(record, cell, busy)),
    )


_OF_PART = ("status.json", "scores.json")


def _facts(record: Record, cell: Cell) -> Facts:
    status, parts = record.status(), _parts(record, cell)
    kept = {name: status[name] for name in _OF_STATUS if name in status}
    row = last_row(record.metrics_file) if status else {}
    return {
        "status": kept,
        "row": {name: row[name] for name in _OF_ROW if name in row},
        "errors": [_last_line(status), *(_last_line(part.status()) for part in parts)],
        "parts": [part.state() for part in parts],
        "scores": [list(part.scores()) for part in parts],
    }


def _last_line(status: dict[str, Any]) -> str | None:
    if status.get("state") != "failed":
        return None
    lines = str(status.get("error") or "").strip().splitlines()
    return lines[-1] if lines else "failed without a message"


def _state(facts: Facts, n: int, cell: Cell) -> State:
    """Of an evaluation; one that lacks a metric is not done."""
    state: State = facts["parts"][n]
    lacks = not set(cell.evaluations[n].metrics) <= set(facts["scores"][n])
    return "missing" if state == "done" and lacks else state


def _failure(facts: Facts, record: Record, cell: Cell) -> tuple[str, Path] | tuple[None, None]:
    for n, error in enumerate(facts["errors"]):
        if error is not None:
            return error, [record, *_parts(record, cell)][n].status_file
    return None, None


def _parts(record: Record, cell: Cell) -> list[EvaluationRecord]:
    return [record.evaluation(evaluation) for evaluation in cell.evaluations]


def _owner(record: Record) -> str | None:
    facts = owner(record.folder)
    return None if not facts else f"{facts.get('host')}:{facts.get('pid')}"


def _finished(facts: Facts) -> dict[str, Any]:
    status, row = facts["status"], facts["row"]
    clock = status.get("seconds")
    return {
        "step": int(status.get("steps") or row.get("step", 0)),
        "loss": row.get("loss"),
        "on_policy": row.get("on_policy"),
        "tokens_per_second": status["tokens"] / clock if clock and "tokens" in status else None,
        "seconds_left": None,
    }


def _under_way(record: Record, cell: Cell, busy: bool) -> dict[str, Any]:
    begun = busy or record.steps_folder.exists()
    history = record.history() if begun else []
    last = history[-1] if history else {}
    step = int(last.get("step", 0))
    pace = seconds_a_step(record.times()) if busy else None
    return {
        "step": step,
        "loss": last.get("loss"),
        "on_policy": last.get("on_policy"),
        "tokens_per_second": _tokens_a_step(history, cell) / pace if pace else None,
        "seconds_left": None if pace is None else pace * (cell.training.steps - step),
    }


def _tokens_a_step(history: list[dict[str, Any]], cell: Cell) -> float:
    return tokens(history, cell.training.batch_size) / history[-1]["step"] if history else 0.0
