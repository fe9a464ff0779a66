"""State of a cell: computed here only, from its status files and the lock on its folder.

done      `status.json` says so, and every requested metric has a score
failed    `status.json` says so
running   no stored state, and a process holds the lock
missing   no stored state, and no process holds the lock
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["done", "running", "failed", "missing"]
StoredState = Literal["done", "failed"] | None
"""State that a `status.json` stores; None while there is none."""

_STATES_WORST_FIRST: tuple[State, ...] = ("failed", "missing", "running", "done")


@dataclass(frozen=True)
class CellState:
    """States of a cell's training and of each of its evaluations."""

    training: State
    evaluations: tuple[State, ...]
    is_running: bool
    """Whether a process holds the lock while something is unfinished."""

    @property
    def whole(self) -> State:
        """The worst state of training and evaluations: failed, missing, running, done."""
        return combine_states([self.training, *self.evaluations])


def compute_cell_state(
    training: StoredState, evaluations: Sequence[StoredState], is_locked: Callable[[], bool]
) -> CellState:
    """Return a record's CellState; what has no stored state is running if the record is locked, else missing.

    evaluations: the state of each by `require_metrics`. is_locked: as `Record.is_locked`; called at most
    once, and only where a stored state is missing. An evaluation of a failed training is never running.
    """
    is_running = None in (training, *evaluations) and is_locked()
    unfinished: State = "running" if is_running else "missing"
    unevaluated: State = "missing" if training == "failed" else unfinished
    return CellState(training or unfinished, tuple(state or unevaluated for state in evaluations), is_running)


def require_metrics(
    state: StoredState, requested_metrics: Collection[str], scored_metrics: Collection[str]
) -> StoredState:
    """Return an evaluation's stored state, but None for one done without a score for a requested metric."""
    return None if state == "done" and not set(requested_metrics) <= set(scored_metrics) else state


def combine_states(states: Sequence[State]) -> State:
    """Return the worst of several states; from the worst: failed, missing, running, done."""
    return min(states, key=_STATES_WORST_FIRST.index)


def get_error_line(status: Mapping[str, Any]) -> str | None:
    """Return the last line of the error in a failed part's status; None if the state is not failed."""
    if status.get("state") != "failed":
        return None
    lines = str(status.get("error") or "").strip().splitlines()
    return lines[-1] if lines else "failed without a message"
