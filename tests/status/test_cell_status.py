"""Progress of a cell: owner, pace and time left while it runs, error and its file once it failed."""

import os
from pathlib import Path

import pytest

from gkd_lab.config import Cell
from gkd_lab.status.cell_status import CellProgress, read_progress
from gkd_lab.store import Record, Store
from gkd_lab.store.files import write_json_lines
from gkd_lab.store.index import RecordIndex

from ..tables.synthetic_store import build_grid, write_finished_record


@pytest.fixture
def cell() -> Cell:
    return build_grid(grid={"lmbda": [0.5]}, steps=100).cells[0]


def read_cell_progress(cell: Cell, root: Path) -> CellProgress:
    return read_progress(Store(root).get_record(cell), cell, RecordIndex(root))


def write_history(record: Record, steps: int, seconds_per_row: float) -> None:
    """Write a row every ten steps, `seconds_per_row` apart, of batches of 2 sequences of 8 tokens."""
    record.folder.mkdir(parents=True, exist_ok=True)
    record.rewind_history(0)
    rows = ['{"step": 0, "time": 1000.0, "began": true}\n']
    for step in range(10, steps + 1, 10):
        record.log_row({"step": step, "loss": 1 / step, "on_policy": 0.5, "completion_length": 8.0})
        rows.append(f'{{"step": {step}, "time": {1000 + seconds_per_row * step / 10}}}\n')
    (record.folder / "times.jsonl").write_text("".join(rows))


def test_a_cell_without_a_record_is_missing(cell: Cell, tmp_path: Path) -> None:
    progress = read_cell_progress(cell, tmp_path)
    assert (progress.state, progress.step, progress.owner, progress.error, progress.seconds_left) == (
        *("missing", 0),
        *(None, None, None),
    )


def test_a_running_cell_has_an_owner_a_pace_and_a_time_left(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    with record.lock():
        write_history(record, steps=40, seconds_per_row=5.0)
        progress = read_cell_progress(cell, tmp_path)
    assert progress.state == "running"
    assert progress.owner is not None
    assert progress.owner.endswith(f":{os.getpid()}")
    assert (progress.step, progress.loss, progress.on_policy) == (40, 1 / 40, 0.5)
    assert progress.seconds_left == pytest.approx(0.5 * 60)
    assert progress.tokens_per_second == pytest.approx(8 * 2 / 0.5)


def test_a_long_running_cell_is_read_from_its_end(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are those of its last 1,000 rows, and its pace that of its last five."""
    record = Store(tmp_path).get_record(cell)
    record.folder.mkdir(parents=True)
    rows = [{"step": 2 * n, "loss": 1.0, "completion_length": 8.0 if n > 2000 else 99.0} for n in range(3001)]
    write_json_lines(record.metrics_file, rows)
    times = [{"step": 2 * n, "time": 5.0 * n} for n in range(3001)]
    write_json_lines(record.folder / "times.jsonl", times)
    whole_files: list[Path] = []
    monkeypatch.setattr("gkd_lab.store.record.read_json_lines", whole_files.append)
    monkeypatch.setattr("gkd_lab.store.timing.read_json_lines", whole_files.append)
    with record.lock():
        progress = read_cell_progress(cell, tmp_path)
    assert (progress.step, progress.loss, whole_files) == (6000, 1.0, [])
    assert progress.tokens_per_second == pytest.approx(8 * cell.training.batch_size / 2.5)


@pytest.mark.parametrize("rows", [1, 2, 999, 1000, 1001, 1002])
def test_tokens_of_equal_rows_do_not_depend_on_their_number(rows: int, cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    record.folder.mkdir(parents=True)
    numbers = range(1, rows + 1)
    history = [{"step": n, "loss": 1.0, "completion_length": 8.0} for n in numbers]
    write_json_lines(record.metrics_file, history)
    write_json_lines(record.folder / "times.jsonl", [{"step": n, "time": float(n)} for n in (0, *numbers)])
    with record.lock():
        progress = read_cell_progress(cell, tmp_path)
    assert progress.tokens_per_second == pytest.approx(8 * cell.training.batch_size)


def test_an_interrupted_cell_has_its_step_and_no_pace(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    write_history(record, steps=40, seconds_per_row=5.0)
    record.steps_folder.mkdir()
    progress = read_cell_progress(cell, tmp_path)
    assert (progress.state, progress.step, progress.owner) == ("missing", 40, None)
    assert (progress.seconds_left, progress.tokens_per_second) == (None, None)


def test_a_finished_cell_has_its_tokens_per_second(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    write_finished_record(record, cell, 50.0)
    record.finish(steps=100, seconds=20.0, tokens=1600, shared_by=1)
    progress = read_cell_progress(cell, tmp_path)
    assert (progress.state, progress.step, progress.on_policy) == ("done", 100, 0.5)
    assert progress.tokens_per_second == 80.0


def test_a_trained_cell_that_is_being_evaluated_is_running(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    record.finish(steps=100)
    assert read_cell_progress(cell, tmp_path).state == "missing"
    with record.lock():
        progress = read_cell_progress(cell, tmp_path)
    assert (progress.state, progress.step) == ("running", 100)


def test_a_failed_cell_has_the_last_line_of_its_error_and_the_file(cell: Cell, tmp_path: Path) -> None:
    record = Store(tmp_path).get_record(cell)
    record.mark_failed("RuntimeError: first\nthen this", "Traceback")
    progress = read_cell_progress(cell, tmp_path)
    assert (progress.state, progress.error, progress.error_file) == (
        "failed",
        "then this",
        record.status_file,
    )
    record.clear_failure()
    record.finish(steps=100)
    evaluation = record.get_evaluation(cell.evaluations[0])
    evaluation.mark_failed("", "Traceback")
    progress = read_cell_progress(cell, tmp_path)
    assert (progress.error, progress.error_file) == ("failed without a message", evaluation.status_file)
