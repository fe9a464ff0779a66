"""A process that has lost a lock writes nothing more and exits with status 1."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.cli.app import main
from gkd_lab.config.cell import Evaluation
from gkd_lab.runner import evaluate_cells, train_cells
from gkd_lab.runner.dataset import SplitReport, write_split_report
from gkd_lab.store import EvaluationRecord, Record, Store, heartbeat
from gkd_lab.store.files import append_json_line, quarantine_path, write_json
from gkd_lab.store.rescore import rescore_evaluation
from gkd_lab.training.checkpoints import create_folder_atomically, remove_other_checkpoints

from .tiny_experiments import tiny_grid

TAKER_SCRIPT = """
import errno, fcntl, socket, sys
from pathlib import Path
socket.gethostname = lambda: "second"
def refuse_to_lock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = refuse_to_lock
from gkd_lab.store import Record
with Record(Path(sys.argv[1])).lock().acquire(timeout=60):
    print("taken", flush=True)
    sys.stdin.readline()
"""


def take_over(record: Record) -> None:
    """Replace the owner of a record's lock, as another machine does after this process was silent."""
    facts = {"host": "far", "pid": 7, "machine": "far/1", "process": "1/7/1", "token": "t"}
    path = record.folder / "other"
    path.write_text(json.dumps(facts))
    path.replace(record.folder / ".owner.json")


def read_files(folder: Path) -> dict[str, bytes]:
    """Return relative name -> bytes of all files, but those of heartbeats and of unfinished folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".owner") and ".part" not in str(path)
    }


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    evaluation = tiny_grid(tmp_path, "arithmetic").cells[0].evaluations[0]
    assert isinstance(evaluation, Evaluation)
    return evaluation


@pytest.fixture
def record(tmp_path: Path, evaluation: Evaluation) -> Iterator[Record]:
    """Locked record with a file of each kind."""
    record = Record(tmp_path / "record")
    with record.lock():
        record.log_row({"step": 1, "loss": 1.0})
        record.log_selection({"step": 1, "accuracy": 1.0})
        record.write_provenance({})
        record.write_unpackable_reason("a reason")
        for step in (1, 2):
            with create_folder_atomically(record.steps_folder / f"checkpoint-{step}") as folder:
                (folder / "model.safetensors").write_bytes(b"weights")
        with create_folder_atomically(record.checkpoint) as folder:
            (folder / "model.safetensors").write_bytes(b"weights")
        get_evaluation(record, evaluation).write_results(evaluation, [], {})
        yield record


def get_evaluation(record: Record, evaluation: Evaluation) -> EvaluationRecord:
    return record.get_evaluation(evaluation)


def save_checkpoint(record: Record, _: Evaluation) -> None:
    with create_folder_atomically(record.steps_folder / "checkpoint-3") as folder:
        (folder / "model.safetensors").write_bytes(b"weights")


WRITES: dict[str, Callable[[Record, Evaluation], Any]] = {
    "spec": lambda record, evaluation: record.write_spec(evaluation),
    "metrics": lambda record, _: record.log_row({"step": 2, "loss": 0.5}),
    "selection": lambda record, _: record.log_selection({"step": 2, "accuracy": 0.5}),
    "resume": lambda record, _: record.rewind_history(0),
    "checkpoint": save_checkpoint,
    "old checkpoints": lambda record, _: remove_other_checkpoints(str(record.steps_folder), 2),
    "provenance": lambda record, _: record.write_provenance({"a": 1}),
    "finish": lambda record, _: record.finish(steps=1),
    "done": lambda record, _: record.mark_done(),
    "failed": lambda record, _: record.mark_failed("ValueError: no"),
    "packability": lambda record, _: record.delete_unpackable_reason(),
    "results": lambda record, evaluation: get_evaluation(record, evaluation).write_results(
        evaluation, [{"prediction": "1"}], {}
    ),
    "retry": lambda record, evaluation: get_evaluation(record, evaluation).clear_status(),
    "row counts": lambda record, evaluation: write_split_report(
        get_evaluation(record, evaluation).folder, "test", SplitReport(1, 0, 0)
    ),
    "repair": lambda record, _: quarantine_path(record.checkpoint),
    "texts": lambda record, _: write_json(record.folder / "texts.jsonl", {}),
    "lines": lambda record, _: append_json_line(record.metrics_file, {}),
}


@pytest.mark.parametrize("name", WRITES)
def test_loser_of_a_lock_writes_nothing(name: str, record: Record, evaluation: Evaluation) -> None:
    take_over(record)
    files = read_files(record.folder)
    with pytest.raises(heartbeat.LockLost, match="process 7 on far took over its work"):
        WRITES[name](record, evaluation)
    assert read_files(record.folder) == files


@pytest.mark.parametrize("name", WRITES)
def test_owner_of_a_lock_writes(name: str, record: Record, evaluation: Evaluation) -> None:
    files = read_files(record.folder)
    WRITES[name](record, evaluation)
    assert read_files(record.folder) != files


def test_loser_in_the_middle_of_a_checkpoint_does_not_put_it_in_place(record: Record) -> None:
    files = read_files(record.folder)
    with pytest.raises(heartbeat.LockLost), create_folder_atomically(record.checkpoint) as folder:
        (folder / "model.safetensors").write_bytes(b"others")
        take_over(record)
    assert read_files(record.folder) == files


def test_loser_of_one_lock_writes_to_no_other_record_either(tmp_path: Path) -> None:
    first, second = Record(tmp_path / "first"), Record(tmp_path / "second")
    with first.lock(), second.lock():
        take_over(first)
        second.mark_done()  # nothing has been lost there
        with pytest.raises(heartbeat.LockLost):
            first.mark_done()
        with pytest.raises(heartbeat.LockLost, match="took over"):
            second.clear_status()
    assert second.read_status() == {"state": "done"}


def test_overdue_owner_beats_before_it_writes_and_keeps_its_lock(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process that no other has replaced goes on, and the limit begins anew for the others."""
    (held,) = heartbeat._active_heartbeats
    held._last_beat -= 2 * held.stale_seconds
    owner_before = (record.folder / ".owner.json").read_bytes()
    assert held.is_overdue()
    record.mark_done()
    assert record.read_status()["state"] == "done"
    assert (record.folder / ".owner.json").read_bytes() != owner_before
    assert not held.is_overdue()


def test_loser_keeps_its_predictions_unscored(record: Record, evaluation: Evaluation) -> None:
    evaluation_record = get_evaluation(record, evaluation)
    row = {"prompt": "1 + 1", "prediction": "#### 2", "references": ["#### 2"], "tokens": 2}
    row |= {"ended": True, "sample": 0, "scores": {}}
    evaluation_record.write_results(evaluation, [row], {})
    take_over(record)
    files = read_files(record.folder)
    with pytest.raises(heartbeat.LockLost):
        rescore_evaluation(evaluation_record, ["accuracy"])
    assert read_files(record.folder) == files


STAGES: dict[str, tuple[Any, str]] = {
    "training": (train_cells, "load_teacher"),
    "export": (train_cells, "save_student"),
    "provenance": (train_cells, "collect_provenance"),
    "finish": (Record, "finish"),
    "evaluation": (evaluate_cells, "generate_predictions"),
    "scores": (evaluate_cells, "score_predictions"),
}
"""Stage -> where the function is that begins it."""


@pytest.mark.parametrize("stage", STAGES)
def test_run_that_loses_a_lock_in_a_stage_exits_with_1_and_writes_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0.5]}, evaluations=[{"decoding": "greedy"}])
    outputs = tmp_path / "outputs"
    record = Store(outputs).get_record(grid.cells[0])
    owner, name = STAGES[stage]
    work, files = getattr(owner, name), dict[str, bytes]()

    def lose_lock_and_work(*arguments: Any, **keywords: Any) -> Any:
        if (record.folder / "spec.json").exists() and not files:
            take_over(record)
            files.update(read_files(record.folder))
        return work(*arguments, **keywords)

    monkeypatch.setattr(owner, name, lose_lock_and_work)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["run", "tiny.yaml", "--outputs", str(outputs)])
    assert stop.value.code == 1
    assert "process 7 on far took over its work" in capsys.readouterr().err
    assert files, "the stage was reached"
    assert read_files(record.folder) == files
    assert json.loads((record.folder / ".owner.json").read_text())["host"] == "far"
    assert heartbeat._active_heartbeats == []


@pytest.mark.slow
def test_stopped_run_that_continues_after_a_takeover_writes_nothing(tmp_path: Path) -> None:
    """SIGSTOP in an evaluation, a takeover from another host, SIGCONT: exit status 1, no file is changed."""
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0.5]}, evaluations=[{"decoding": "greedy"}])
    record = Store(tmp_path / "outputs").get_record(grid.cells[0])
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "GKD_LAB_STALE_SECONDS": "1",
    }
    script = [sys.executable, str(Path(__file__).with_name("fenced_script.py")), "first"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    pipes |= {"text": True, "env": environment, "cwd": tmp_path}
    loser = subprocess.Popen([*script, "run", "tiny.yaml"], **pipes)
    assert loser.stdout is not None
    assert loser.stdout.readline() == "evaluating\n"
    start = time.monotonic()
    loser.send_signal(signal.SIGSTOP)
    taker = subprocess.Popen([sys.executable, "-c", TAKER_SCRIPT, str(record.folder)], **pipes)
    assert taker.stdout is not None
    assert taker.stdout.readline() == "taken\n"
    assert time.monotonic() - start > 1, "the limit"
    files = read_files(record.folder)
    loser.send_signal(signal.SIGCONT)
    _, errors = loser.communicate("\n")
    assert loser.returncode == 1, errors
    assert f"process {taker.pid} on second took over its work" in errors
    assert read_files(record.folder) == files
    taker.communicate("\n")
    assert taker.returncode == 0
    assert read_files(record.folder) == files
    assert errors.count("has no file locks (flock)") == 1
