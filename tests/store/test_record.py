"""A record is done, failed or missing, whatever files an interrupted run has left."""

import subprocess
import sys
from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.config import Cell
from gkd_lab.store import DamagedRecord, Record, Store


@pytest.fixture(scope="module")
def cells() -> tuple[Cell, ...]:
    return experiments.load("quickstart").cells


@pytest.fixture
def record(tmp_path: Path, cells: tuple[Cell, ...]) -> Record:
    return Store(tmp_path).get_record(cells[0])


def test_record_folder_is_the_cells_folder(tmp_path: Path, cells: tuple[Cell, ...]) -> None:
    assert Store(tmp_path).get_record(cells[3]).folder == tmp_path / cells[3].folder


def test_record_goes_from_missing_to_done(record: Record, cells: tuple[Cell, ...]) -> None:
    assert record.read_state() == "missing"
    record.write_spec(cells[0].training)
    record.log_row({"step": 1, "loss": 0.5})
    record.steps_folder.mkdir()
    assert record.read_state() == "missing"
    record.finish(steps=1)
    assert record.read_state() == "done"
    assert record.read_status() == {"state": "done", "steps": 1, "seconds": 0.0}
    assert not record.steps_folder.exists()
    record.clear_failure()
    assert record.read_state() == "done"


def test_failure_keeps_its_traceback_until_cleared(record: Record) -> None:
    record.mark_failed("ValueError: no", "Traceback ...")
    assert record.read_state() == "failed"
    assert record.read_status()["traceback"] == "Traceback ..."
    record.clear_failure()
    assert record.read_state() == "missing"
    record.clear_failure()


@pytest.mark.parametrize("text", ["", '{"state": "do', '{"state": "finished"}', "{}", "[]"])
def test_damaged_status_counts_as_missing(text: str, record: Record, cells: tuple[Cell, ...]) -> None:
    evaluation_record = record.get_evaluation(cells[0].evaluations[0])
    for record_part in (record, evaluation_record):
        record_part.folder.mkdir(parents=True)
        record_part.status_file.write_text(text)
        assert record_part.read_status() == {}
        assert record_part.read_state() == "missing"


def test_evaluation_is_done_once_its_status_is_written(record: Record, cells: tuple[Cell, ...]) -> None:
    evaluation = cells[0].evaluations[0]
    evaluation_record = record.get_evaluation(evaluation)
    assert (
        evaluation_record.read_state(),
        evaluation_record.read_scores(),
        evaluation_record.read_prediction_rows(),
    ) == ("missing", {}, [])
    evaluation_record.write_results(
        evaluation, [{"prediction": "a\u2028b"}], {"accuracy": {"value": 1.0}}, seconds=2
    )
    assert evaluation_record.read_state() == "done"
    assert evaluation_record.read_prediction_rows() == [{"prediction": "a\u2028b"}]
    assert evaluation_record.read_scores() == {"accuracy": {"value": 1.0}}


def test_folder_of_another_run_is_not_overwritten(record: Record, cells: tuple[Cell, ...]) -> None:
    record.write_spec(cells[0].training)
    record.write_spec(cells[0].training)
    with pytest.raises(DamagedRecord, match=r"spec\.json .*another run"):
        record.write_spec(cells[1].training)


def test_damaged_spec_is_rewritten(record: Record, cells: tuple[Cell, ...]) -> None:
    record.write_spec(cells[0].training)
    (record.folder / "spec.json").write_text('{"fingerpr')
    record.write_spec(cells[0].training)
    with pytest.raises(DamagedRecord):
        record.write_spec(cells[1].training)


HOLD_LOCK = """
import sys
from pathlib import Path
from gkd_lab.store import Record
with Record(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_is_visible_to_others_and_freed_with_its_process(record: Record) -> None:
    assert not record.is_locked()
    assert not record.folder.exists()
    command = [sys.executable, "-c", HOLD_LOCK, str(record.folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert record.is_locked()
    assert record.read_state() == "running"
    holder.kill()
    holder.communicate()
    assert not record.is_locked()
    assert record.read_state() == "missing"
    with record.lock():
        pass
