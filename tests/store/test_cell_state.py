"""The state of a cell follows from its status files and its lock."""

import pytest

from gkd_lab.store import State, combine_states
from gkd_lab.store.cell_state import StoredState, compute_cell_state, get_error_line, require_metrics


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        (["done", "done"], "done"),
        (["done", "running"], "running"),
        (["done", "missing"], "missing"),
        (["running", "missing"], "missing"),
        (["missing", "failed", "done"], "failed"),
    ],
)
def test_combined_state_is_the_worst(states: list[State], whole: State) -> None:
    assert combine_states(states) == combine_states(states[::-1]) == whole


@pytest.mark.parametrize(
    ("training", "evaluations", "is_locked", "expected", "whole"),
    [
        ("done", ["done", "done"], True, ("done", "done", "done"), "done"),
        ("done", ["done", None], False, ("done", "done", "missing"), "missing"),
        ("done", ["failed", None], True, ("done", "failed", "running"), "failed"),
        (None, [None], True, ("running", "running"), "running"),
        (None, [None], False, ("missing", "missing"), "missing"),
        ("failed", [None], True, ("failed", "missing"), "failed"),
    ],
)
def test_unfinished_parts_are_running_while_locked(
    training: StoredState,
    evaluations: list[StoredState],
    is_locked: bool,
    expected: tuple[State, ...],
    whole: State,
) -> None:
    state = compute_cell_state(training, evaluations, lambda: is_locked)
    assert (state.training, *state.evaluations) == expected
    assert state.whole == whole
    assert state.is_running == (is_locked and None in (training, *evaluations))


def test_lock_is_not_read_for_finished_cells() -> None:
    def fail() -> bool:
        raise AssertionError

    assert compute_cell_state("done", ["done"], fail).whole == "done"


def test_evaluation_without_a_requested_metric_is_not_done() -> None:
    assert require_metrics("done", ["rouge1"], ["rouge1", "bleu"]) == "done"
    assert require_metrics("done", ["rouge1", "bleu"], ["rouge1"]) is None
    assert require_metrics("failed", ["rouge1"], []) == "failed"
    assert require_metrics(None, [], []) is None


def test_error_line_is_the_last_line_of_a_failure() -> None:
    assert get_error_line({"state": "failed", "error": "first\nlast\n"}) == "last"
    assert get_error_line({"state": "failed", "error": ""}) == "failed without a message"
    assert get_error_line({"state": "done", "error": "old"}) is None
