"""A tracker mirrors the rows, scores and status of records, resumes runs, and never fails a cell."""

import base64
import errno
import io
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from gkd_lab import experiments
from gkd_lab.config import Cell, ConfigError
from gkd_lab.runner.progress import Reporter, silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.trackers import MirrorTracker, OpenRun, Tracker, create_tracker
from gkd_lab.runner.wandb_tracker import build_run_id
from gkd_lab.store import Store

from ..wandb_server import KEY, Server, run_server
from .tiny_experiments import options, tiny_grid
from .tracked_script import (
    SCORES,
    build_row,
    connect_wandb,
    create_recorded_tracker,
    create_two_cells,
    finish_record,
    write_rows,
    write_scores,
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Test server that wandb in this process is logged in to."""
    with run_server() as new_server, connect_wandb(new_server, tmp_path / "wandb", monkeypatch):
        yield new_server
    assert new_server.unknown == []


def run_python(code: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process that can import the tests."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def find_files_containing(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_no_tracker_library_is_imported_without_a_tracker() -> None:
    code = """
import sys
from gkd_lab.runner.trackers import create_tracker
create_tracker("none", "quickstart", None, None)
from gkd_lab.runner.run_options import RunOptions
sys.exit("wandb" in sys.modules or "trackio" in sys.modules or "torch" in sys.modules)
"""
    assert run_python(code).returncode == 0


def test_each_cell_of_a_pack_has_a_run_equal_to_its_record(tmp_path: Path, server: Server) -> None:
    silence_libraries()
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0.5, 1]})
    outputs = tmp_path / "outputs"
    tracker, output = create_recorded_tracker(outputs)
    outcome = run_grid(grid, options(outputs, tracker=tracker))
    assert outcome.failures == []
    assert len(server.runs) == 2
    for cell in grid.cells:
        record, tracked_run = Store(outputs).get_record(cell), server.runs[build_run_id(cell)]
        assert (tracked_run.name, tracked_run.group) == (f"arithmetic/{record.folder.name}", "quickstart")
        assert tracked_run.config["lmbda"] == cell.lmbda
        assert tracked_run.config["spec"] == cell.training.model_dump(mode="json")
        *training_rows, first, second = tracked_run.history
        assert [{"step": path.pop("_step"), **path} for path in training_rows] == record.read_history()
        assert (first["_step"], second["_step"]) == (5, 6)
        for score_row, evaluation in zip((first, second), cell.evaluations, strict=True):
            scores = record.get_evaluation(evaluation).read_scores()
            expected = {f"{evaluation.name}/{name}": path["value"] for name, path in scores.items()}
            assert {name: value for name, value in score_row.items() if name != "_step"} == expected
            assert expected.items() <= tracked_run.summary.items()
        assert tracked_run.summary["status"] == "done"
        assert tracked_run.exit_code == 0
    assert output.getvalue().startswith(f"wandb: {server.url}/")
    assert find_files_containing(KEY, tmp_path) == []
    assert run_grid(grid, options(outputs, tracker=create_recorded_tracker(outputs)[0])).failures == []
    assert all(len(path.history) == 4 for path in server.runs.values()), "finished cells open no run"


def test_failed_cell_has_a_run_with_the_error(tmp_path: Path, server: Server) -> None:
    silence_libraries()
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0], "learning_rate": [1e-3, 1e30]})
    outputs = tmp_path / "outputs"
    run_grid(grid, options(outputs, tracker=create_recorded_tracker(outputs)[0]))
    good, bad = (server.runs[build_run_id(cell)] for cell in grid.cells)
    assert (good.summary["status"], good.exit_code) == ("done", 0)
    assert (bad.summary["status"], bad.exit_code) == ("failed", 1)
    assert bad.summary["error"].startswith("FloatingPointError: ")
    assert "learning_rate" in bad.config


def test_resumed_cell_resumes_its_run_without_repeated_rows(tmp_path: Path, server: Server) -> None:
    """The first process is killed at step 60, after a checkpoint at step 40."""
    (cell, record), _ = create_two_cells(tmp_path)
    record.folder.mkdir(parents=True)
    tracker, _ = create_recorded_tracker(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
        for step in (20, 40, 60):
            record.log_row(build_row(step))
            tracker.log_row(record, build_row(step))
    record.rewind_history(40)
    tracker, _ = create_recorded_tracker(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
        for step in (60, 80):
            record.log_row(build_row(step))
            tracker.log_row(record, build_row(step))
        record.finish(steps=80)
        write_scores(cell, record)
        tracker.log_scores(record)
    (tracked_run,) = server.runs.values()
    assert [path["_step"] for path in tracked_run.history] == [20, 40, 60, 80, cell.training.steps + 1]
    assert tracked_run.history[-1]["greedy/accuracy"] == 0.25
    tracker, _ = create_recorded_tracker(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
    assert len(tracked_run.history) == 5, "scores are not sent twice"
    for evaluation in cell.evaluations:
        record.get_evaluation(evaluation).write_results(evaluation, [], {**SCORES, "added": {"value": 0.5}})
    tracker, _ = create_recorded_tracker(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
    (last,) = tracked_run.history[5:]
    assert last == {"_step": cell.training.steps + 2, "greedy/added": 0.5}


def test_stored_history_and_scores_are_sent_at_the_start(tmp_path: Path, server: Server) -> None:
    (cell, record), _ = create_two_cells(tmp_path)
    write_rows(record, 20, 40)
    finish_record(cell, record)
    tracker, _ = create_recorded_tracker(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
    (tracked_run,) = server.runs.values()
    assert [path["_step"] for path in tracked_run.history] == [20, 40, cell.training.steps + 1]
    assert tracked_run.summary["status"] == "done"


def test_interrupted_and_crashed_runs_have_a_status(tmp_path: Path, server: Server) -> None:
    (first, record), (second, second_record) = create_two_cells(tmp_path)
    tracker, _ = create_recorded_tracker(tmp_path)
    with pytest.raises(KeyboardInterrupt), tracker.open_session():
        tracker.start_run(first, record)
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="disk"), tracker.open_session():
        tracker.start_run(second, second_record)
        raise OSError("disk full")
    path, two = server.runs.values()
    assert (path.summary["status"], path.preempting) == ("interrupted", True)
    assert (two.summary["error"], two.preempting) == ("OSError: disk full", False)
    assert path.exit_code != 0
    assert two.exit_code != 0


def test_runs_without_a_login_are_offline_and_can_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = tmp_path / "outputs"
    with run_server() as server:
        with connect_wandb(server, tmp_path / "home", monkeypatch):
            monkeypatch.delenv("WANDB_API_KEY")
            monkeypatch.delenv("WANDB_DIR")
            tracker, output = create_recorded_tracker(outputs)
            with tracker.open_session():
                for cell, record in create_two_cells(outputs):
                    tracker.start_run(cell, record)
                    write_rows(record, 20)
                    tracker.log_row(record, build_row(20))
                    finish_record(cell, record)
                    tracker.log_scores(record)
            assert server.runs == {}
            folders = sorted((outputs / "wandb").glob("offline-run-*"))
            assert len(folders) == 2
            assert f"wandb sync {outputs}/wandb/offline-run-*" in output.getvalue()
        command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
        environment = server.environment(tmp_path / "home")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert set(server.runs) == {build_run_id(cell) for cell, _ in create_two_cells(outputs)}
        for tracked_run in server.runs.values():
            assert [path["_step"] for path in tracked_run.history] == [20, tracked_run.history[-1]["_step"]]
            assert tracked_run.history[-1]["greedy/accuracy"] == 0.25
            assert tracked_run.summary["status"] == "done"


def test_runs_are_offline_with_a_warning_if_the_server_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed_socket, run_server() as server:
        closed_socket.bind(("127.0.0.1", 0))  # bound but not listening, so that connections are refused
        fail_to_open = f"http://127.0.0.1:{closed_socket.getsockname()[1]}"
        variables = {"WANDB_BASE_URL": fail_to_open, "WANDB_INIT_TIMEOUT": "1"}
        with connect_wandb(server, tmp_path / "home", monkeypatch, **variables):
            tracker, output = create_recorded_tracker(tmp_path)
            with tracker.open_session():
                for cell, record in create_two_cells(tmp_path):
                    tracker.start_run(cell, record)
            assert len(list((tmp_path / "home" / "wandb").glob("offline-run-*"))) == 2
    assert output.getvalue().count("warning") == 1, output.getvalue()
    assert "offline" in output.getvalue()


class FullDisk:
    """Open run whose writes fail."""

    next_step = 0
    logged_scores: ClassVar[set[str]] = set()

    def log(self, build_row: Mapping[str, Any], step: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def refuse_to_open(cell: Cell, config: dict[str, Any]) -> FullDisk:
    raise ConnectionError("nobody there")


@pytest.mark.parametrize("open_run", [lambda cell, config: FullDisk(), refuse_to_open])
def test_failing_tracker_causes_one_warning(open_run: OpenRun, tmp_path: Path) -> None:
    output = io.StringIO()
    tracker = MirrorTracker(
        "it", open_run, "quickstart", Reporter(Console(file=output, width=500)), has_agent=False
    )
    with tracker.open_session():
        for cell, record in create_two_cells(tmp_path):
            tracker.start_run(cell, record)
            write_rows(record, 20)
            tracker.log_row(record, build_row(20))
            finish_record(cell, record)
            tracker.log_scores(record)
    assert output.getvalue().count("warning: it failed (") == 1, output.getvalue()
    assert output.getvalue().count("\n") == 1


def test_runs_are_not_opened_after_two_failed_attempts(tmp_path: Path) -> None:
    """Each attempt may wait half a minute for a server."""
    opened_cells: list[str] = []

    def fail_to_open(cell: Cell, config: dict[str, Any]) -> FullDisk:
        opened_cells.append(cell.fingerprint)
        raise ConnectionError("nobody there")

    tracker = MirrorTracker("it", fail_to_open, "quickstart", Reporter(Console(quiet=True)), has_agent=False)
    with tracker.open_session():
        for cell in experiments.load("quickstart", outputs=tmp_path).cells:
            tracker.start_run(cell, Store(tmp_path).get_record(cell))
    assert len(opened_cells) == 2


def test_no_file_contains_the_api_key(tmp_path: Path, server: Server) -> None:
    (cell, record), _ = create_two_cells(tmp_path)
    tracker, _ = create_recorded_tracker(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
        finish_record(cell, record)
    assert any(KEY in decode_key(header) for header in server.keys)
    assert list(tmp_path.rglob("*.wandb"))
    assert find_files_containing(KEY, tmp_path) == []


def decode_key(header: str) -> str:
    return base64.b64decode(header.removeprefix("Basic ")).decode()


def test_wandb_does_not_store_the_command(tmp_path: Path) -> None:
    """The command may contain a token; the record's provenance has it redacted."""
    code = """
import sys
from pathlib import Path
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.trackers import create_tracker
from tests.runner.tracked_script import create_two_cells
place = Path(sys.argv[1])
tracker = create_tracker("wandb", "quickstart", place, Reporter())
with tracker.open_session():
    tracker.start_run(*create_two_cells(place)[0])
"""
    words = (str(tmp_path), "--password", "correcthorse")
    done = run_python(code, *words, WANDB_MODE="offline", HOME=str(tmp_path), WANDB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.wandb"))
    assert find_files_containing("correcthorse", tmp_path) == []


TRACKIO_SCRIPT = """
import sys
from pathlib import Path
from tests.runner.tracked_script import build_row, create_recorded_tracker, create_two_cells
from tests.runner.tracked_script import finish_record, write_rows
place = Path(sys.argv[1])
tracker, output = create_recorded_tracker(place, "trackio")
with tracker.open_session():
    for cell, record in create_two_cells(place):
        tracker.start_run(cell, record)
        write_rows(record, 20)
        tracker.log_row(record, build_row(20))
        finish_record(cell, record)
        tracker.log_scores(record)
print(output.getvalue(), end="")
"""


def test_trackio_stores_rows_scores_and_status(tmp_path: Path) -> None:
    """Two runs at once, in a new process, because trackio reads its folder when it is imported."""
    pytest.importorskip("trackio", reason="the extra `trackio` is not installed")
    folder = tmp_path / "trackio"
    done = run_python(TRACKIO_SCRIPT, str(tmp_path), TRACKIO_DIR=str(folder))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with sqlite3.connect(folder / "gkd-lab.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics order by run_name, step").fetchall()
    cells = create_two_cells(tmp_path)
    last = cells[0][0].training.steps
    names = sorted(f"arithmetic/{record.folder.name}" for _, record in cells)
    steps = (20, last + 1, last + 2)
    assert [(name, step) for name, step, _ in rows] == [(name, step) for name in names for step in steps]
    assert b'"loss":0.05' in rows[0][2]
    assert b'"greedy/accuracy":0.25' in rows[1][2]
    assert b'"status":"done"' in rows[2][2]


def test_missing_trackio_is_refused_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # importing it raises ImportError
    with pytest.raises(ConfigError, match=r"gkd-lab\[track"):
        create_recorded_tracker(tmp_path, "trackio")


def test_no_tracker_does_nothing(tmp_path: Path) -> None:
    tracker = create_tracker("none", "quickstart", tmp_path, None)  # type: ignore[arg-type]
    assert type(tracker) is Tracker
    with tracker.open_session():
        for cell, record in create_two_cells(tmp_path):
            tracker.start_run(cell, record)
            tracker.finish_run(record)
    assert list(tmp_path.iterdir()) == []
