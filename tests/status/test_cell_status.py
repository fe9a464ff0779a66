"""What `status` shows of a cell: owner, pace and time left while it runs, error and log once it failed."""

import os
from pathlib import Path

import pytest

from gkd_lab.config import Cell
from gkd_lab.status.cell_status import CellProgress, read_progress
from gkd_lab.store import Record, Store
from gkd_lab.store.index import RecordIndex

from ..tables.synthetic_store import build_grid, write_finished_record


@pytest.fixture
def cell() -> Cell:
    return build_grid(grid={"lmbda": [0.5]}, steps=100).cells[0]


def seen(cell: Cell, root: Path) -> CellProgress:
    return read_progress(Store(root).get_record(cell), cell, RecordIndex(root))


def begun(record: Record, steps: int, each: float) -> None:
    """A row of the history every ten steps, `each` seconds apart, of batches of 2 sequences of 8 tokens."""
    record.folder.mkdir(parents=True, exist_ok=True)
    record.rewind_history(0)
    rows = ['{"step": 0, "time": 1000.0, "began": true}\n']
    for step in range(10, steps + 1, 10):
        record.log_row({"step": step, "loss": 1 / step, "on_policy": 0.5, "completion_length": 8.0})
        rows.append(f'{{"step": {step}, "time": {1000 + each * step / 10}}}\n')
    (record.folder / "times.jsonl").write_text("".join(rows))


def test_a_cell_that_was_not_begun_is_missing_and_nothing_more(cell: Cell, tmp_path: Path) -> None:
    found = seen(cell, tmp_path)
    assert (found.state, found.step, found.owner, found.error, found.seconds_left) == (
        *("missing", 0),
        *(None, None, None),
    )


def test_a_running_cell_has_an_owner_a_pace_and_a_time_left(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    with record.lock():
        begun(record, steps=40, each=5.0)
        found = seen(cell, tmp_path)
    assert found.state == "running"
    assert found.owner is not None
    assert found.owner.endswith(f":{os.getpid()}")
    assert (found.step, found.loss, found.on_policy) == (40, 1 / 40, 0.5)
    assert found.seconds_left == pytest.approx(0.5 * 60)
    assert found.tokens_per_second == pytest.approx(8 * 2 / 0.5)


def test_a_cell_that_its_owner_left_keeps_its_step_and_has_no_pace(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    begun(record, steps=40, each=5.0)
    record.steps_folder.mkdir()
    found = seen(cell, tmp_path)
    assert (found.state, found.step, found.owner) == ("missing", 40, None)
    assert (found.seconds_left, found.tokens_per_second) == (None, None)


def test_a_finished_cell_says_how_fast_it_was(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    write_finished_record(record, cell, 50.0)
    record.finish(steps=100, seconds=20.0, tokens=1600, shared_by=1)
    found = seen(cell, tmp_path)
    assert (found.state, found.step, found.on_policy) == ("done", 100, 0.5)
    assert found.tokens_per_second == 80.0


def test_a_trained_cell_whose_evaluation_is_under_way_is_running(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    record.finish(steps=100)
    assert seen(cell, tmp_path).state == "missing"
    with record.lock():
        found = seen(cell, tmp_path)
    assert (found.state, found.step) == ("running", 100)


def test_a_failure_is_the_last_line_of_its_error_and_names_its_log(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    record.mark_failed("RuntimeError: first\nthen this", "Traceback")
    found = seen(cell, tmp_path)
    assert (found.state, found.error, found.error_file) == ("failed", "then this", record.status_file)
    record.clear_failure()
    record.finish(steps=100)
    part = record.get_evaluation(cell.evaluations[0])
    part.mark_failed("", "Traceback")
    found = seen(cell, tmp_path)
    assert (found.error, found.error_file) == ("failed without a message", part.status_file)
