"""A tracker mirrors records: rows, scores, verdicts. It survives kills and takes no cell down with it."""

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
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.trackers import MirrorTracker, OpenRun, Tracker, create_tracker
from gkd_lab.runner.wandb_tracker import build_run_id
from gkd_lab.store import Store

from ..wandb_server import KEY, Server, serving
from .tiny_experiments import options, tiny_grid
from .tracked_script import SCORES, finish, follower, judge, row, two_cells, wandb_meeting, write_rows


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that wandb in this process is logged in to."""
    with serving() as found, wandb_meeting(found, tmp_path / "wandb", monkeypatch):
        yield found
    assert found.unknown == []


def python(code: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own, which finds what the tests share."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **more}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def files_with(secret: str, folder: Path) -> list[Path]:
    return [one for one in folder.rglob("*") if one.is_file() and secret.encode() in one.read_bytes()]


def test_without_a_tracker_nothing_of_one_is_imported() -> None:
    code = """
import sys
from gkd_lab.runner.trackers import tracker_named
tracker_named("none", "quickstart", None, None)
from gkd_lab.runner.run_options import RunOptions
sys.exit("wandb" in sys.modules or "trackio" in sys.modules or "torch" in sys.modules)
"""
    assert python(code).returncode == 0


def test_each_cell_of_a_pack_has_a_run_that_says_what_its_record_says(tmp_path: Path, server: Server) -> None:
    silence_libraries()
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0.5, 1]})
    outputs = tmp_path / "outputs"
    tracker, said = follower(outputs)
    outcome = run_grid(grid, options(outputs, tracker=tracker))
    assert outcome.failures == []
    assert len(server.runs) == 2
    for cell in grid.cells:
        record, found = Store(outputs).get_record(cell), server.runs[build_run_id(cell)]
        assert (found.name, found.group) == (f"arithmetic/{record.folder.name}", "quickstart")
        assert found.config["lmbda"] == cell.lmbda
        assert found.config["spec"] == cell.training.model_dump(mode="json")
        *trained, first, second = found.history
        assert [{"step": one.pop("_step"), **one} for one in trained] == record.read_history()
        assert (first["_step"], second["_step"]) == (5, 6)
        for judged, evaluation in zip((first, second), cell.evaluations, strict=True):
            scores = record.get_evaluation(evaluation).read_scores()
            expected = {f"{evaluation.name}/{name}": one["value"] for name, one in scores.items()}
            assert {name: value for name, value in judged.items() if name != "_step"} == expected
            assert expected.items() <= found.summary.items()
        assert found.summary["status"] == "done"
        assert found.exit_code == 0
    assert said.getvalue().startswith(f"wandb: {server.url}/")
    assert files_with(KEY, tmp_path) == []
    assert run_grid(grid, options(outputs, tracker=follower(outputs)[0])).failures == []
    assert all(len(one.history) == 4 for one in server.runs.values()), "nothing was to be done"


def test_a_failure_reaches_its_run_with_its_reason_and_the_neighbour_goes_on(
    tmp_path: Path, server: Server
) -> None:
    silence_libraries()
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0], "learning_rate": [1e-3, 1e30]})
    outputs = tmp_path / "outputs"
    run_grid(grid, options(outputs, tracker=follower(outputs)[0]))
    good, bad = (server.runs[build_run_id(cell)] for cell in grid.cells)
    assert (good.summary["status"], good.exit_code) == ("done", 0)
    assert (bad.summary["status"], bad.exit_code) == ("failed", 1)
    assert bad.summary["error"].startswith("FloatingPointError: ")
    assert "learning_rate" in bad.config


def test_a_resumed_cell_goes_on_with_its_run_and_no_row_is_there_twice(
    tmp_path: Path, server: Server
) -> None:
    """The first process is killed at step 60 and had a checkpoint at 40."""
    (cell, record), _ = two_cells(tmp_path)
    record.folder.mkdir(parents=True)
    tracker, _ = follower(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
        for step in (20, 40, 60):
            record.log_row(row(step))
            tracker.log_row(record, row(step))
    record.rewind_history(40)
    tracker, _ = follower(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
        for step in (60, 80):
            record.log_row(row(step))
            tracker.log_row(record, row(step))
        record.finish(steps=80)
        judge(cell, record)
        tracker.log_scores(record)
    (found,) = server.runs.values()
    assert [one["_step"] for one in found.history] == [20, 40, 60, 80, cell.training.steps + 1]
    assert found.history[-1]["greedy/accuracy"] == 0.25
    tracker, _ = follower(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
    assert len(found.history) == 5, "scores that are there are not sent again"
    for evaluation in cell.evaluations:
        record.get_evaluation(evaluation).write_results(evaluation, [], {**SCORES, "added": {"value": 0.5}})
    tracker, _ = follower(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
    (last,) = found.history[5:]
    assert last == {"_step": cell.training.steps + 2, "greedy/added": 0.5}


def test_what_a_record_holds_from_before_is_sent_first(tmp_path: Path, server: Server) -> None:
    (cell, record), _ = two_cells(tmp_path)
    write_rows(record, 20, 40)
    finish(cell, record)
    tracker, _ = follower(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
    (found,) = server.runs.values()
    assert [one["_step"] for one in found.history] == [20, 40, cell.training.steps + 1]
    assert found.summary["status"] == "done"


def test_an_interrupted_run_is_marked_and_a_crashed_one_says_why(tmp_path: Path, server: Server) -> None:
    (first, record), (second, other) = two_cells(tmp_path)
    tracker, _ = follower(tmp_path)
    with pytest.raises(KeyboardInterrupt), tracker.open_session():
        tracker.start_run(first, record)
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="disk"), tracker.open_session():
        tracker.start_run(second, other)
        raise OSError("disk full")
    one, two = server.runs.values()
    assert (one.summary["status"], one.preempting) == ("interrupted", True)
    assert (two.summary["error"], two.preempting) == ("OSError: disk full", False)
    assert one.exit_code != 0
    assert two.exit_code != 0


def test_without_a_login_runs_are_offline_and_wandb_sync_sends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = tmp_path / "outputs"
    with serving() as server:
        with wandb_meeting(server, tmp_path / "home", monkeypatch):
            monkeypatch.delenv("WANDB_API_KEY")
            monkeypatch.delenv("WANDB_DIR")
            tracker, said = follower(outputs)
            with tracker.open_session():
                for cell, record in two_cells(outputs):
                    tracker.start_run(cell, record)
                    write_rows(record, 20)
                    tracker.log_row(record, row(20))
                    finish(cell, record)
                    tracker.log_scores(record)
            assert server.runs == {}
            folders = sorted((outputs / "wandb").glob("offline-run-*"))
            assert len(folders) == 2
            assert f"wandb sync {outputs}/wandb/offline-run-*" in said.getvalue()
        command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
        environment = server.environment(tmp_path / "home")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert set(server.runs) == {build_run_id(cell) for cell, _ in two_cells(outputs)}
        for found in server.runs.values():
            assert [one["_step"] for one in found.history] == [20, found.history[-1]["_step"]]
            assert found.history[-1]["greedy/accuracy"] == 0.25
            assert found.summary["status"] == "done"


def test_a_server_that_does_not_answer_costs_a_warning_and_runs_are_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken, serving() as server:
        taken.bind(("127.0.0.1", 0))  # bound, and never listening: connections are refused
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        more = {"WANDB_BASE_URL": nobody, "WANDB_INIT_TIMEOUT": "1"}
        with wandb_meeting(server, tmp_path / "home", monkeypatch, **more):
            tracker, said = follower(tmp_path)
            with tracker.open_session():
                for cell, record in two_cells(tmp_path):
                    tracker.start_run(cell, record)
            assert len(list((tmp_path / "home" / "wandb").glob("offline-run-*"))) == 2
    assert said.getvalue().count("warning") == 1, said.getvalue()
    assert "runs are kept offline" in said.getvalue()


class FullDisk:
    """A run that opens and then cannot write."""

    step = 0
    known: ClassVar[set[str]] = set()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def no_run(cell: Cell, config: dict[str, Any]) -> FullDisk:
    raise ConnectionError("nobody there")


@pytest.mark.parametrize("opens", [lambda cell, config: FullDisk(), no_run])
def test_a_tracker_that_fails_costs_one_warning_and_no_cell(opens: OpenRun, tmp_path: Path) -> None:
    said = io.StringIO()
    tracker = MirrorTracker("it", opens, "quickstart", Reporter(Console(file=said, width=500)), agent=False)
    with tracker.open_session():
        for cell, record in two_cells(tmp_path):
            tracker.start_run(cell, record)
            write_rows(record, 20)
            tracker.log_row(record, row(20))
            finish(cell, record)
            tracker.log_scores(record)
    assert said.getvalue().count("warning: it failed (") == 1, said.getvalue()
    assert said.getvalue().count("\n") == 1


def test_a_tracker_that_opens_nothing_is_not_asked_for_every_cell(tmp_path: Path) -> None:
    """Each time may cost the half minute that a server is waited for."""
    asked: list[str] = []

    def nobody(cell: Cell, config: dict[str, Any]) -> FullDisk:
        asked.append(cell.fingerprint)
        raise ConnectionError("nobody there")

    tracker = MirrorTracker("it", nobody, "quickstart", Reporter(Console(quiet=True)), agent=False)
    with tracker.open_session():
        for cell in experiments.load("quickstart", outputs=tmp_path).cells:
            tracker.start_run(cell, Store(tmp_path).get_record(cell))
    assert len(asked) == 2


def test_no_key_is_in_any_file_of_a_tracked_run(tmp_path: Path, server: Server) -> None:
    (cell, record), _ = two_cells(tmp_path)
    tracker, _ = follower(tmp_path)
    with tracker.open_session():
        tracker.start_run(cell, record)
        finish(cell, record)
    assert any(KEY in _decoded(header) for header in server.keys)
    assert list(tmp_path.rglob("*.wandb"))
    assert files_with(KEY, tmp_path) == []


def _decoded(header: str) -> str:
    return base64.b64decode(header.removeprefix("Basic ")).decode()


def test_the_command_as_it_was_typed_is_not_kept_by_wandb(tmp_path: Path) -> None:
    """It may hold a token; the record's provenance has it without."""
    code = """
import sys
from pathlib import Path
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.trackers import tracker_named
from tests.runner.tracked_script import two_cells
place = Path(sys.argv[1])
tracker = tracker_named("wandb", "quickstart", place, Reporter())
with tracker.open():
    tracker.start(*two_cells(place)[0])
"""
    words = (str(tmp_path), "--password", "correcthorse")
    done = python(code, *words, WANDB_MODE="offline", HOME=str(tmp_path), WANDB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.wandb"))
    assert files_with("correcthorse", tmp_path) == []


TRACKIO = """
import sys
from pathlib import Path
from tests.runner.tracked_script import finish, follower, row, two_cells, write_rows
place = Path(sys.argv[1])
tracker, said = follower(place, "trackio")
with tracker.open():
    for cell, record in two_cells(place):
        tracker.start(cell, record)
        write_rows(record, 20)
        tracker.log(record, row(20))
        finish(cell, record)
        tracker.judged(record)
print(said.getvalue(), end="")
"""


def test_trackio_is_a_drop_in(tmp_path: Path) -> None:
    """Two runs at once in one process; trackio reads its folder when it is imported, so in one of its own."""
    pytest.importorskip("trackio", reason="the extra `trackio` is not installed")
    place = tmp_path / "trackio"
    done = python(TRACKIO, str(tmp_path), TRACKIO_DIR=str(place))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with sqlite3.connect(place / "gkd-lab.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics order by run_name, step").fetchall()
    cells = two_cells(tmp_path)
    last = cells[0][0].training.steps
    names = sorted(f"arithmetic/{record.folder.name}" for _, record in cells)
    steps = (20, last + 1, last + 2)
    assert [(name, step) for name, step, _ in rows] == [(name, step) for name in names for step in steps]
    assert b'"loss":0.05' in rows[0][2]
    assert b'"greedy/accuracy":0.25' in rows[1][2]
    assert b'"status":"done"' in rows[2][2]


def test_a_tracker_that_is_not_installed_is_named_with_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # importing it raises ImportError
    with pytest.raises(
        ConfigError, match=r"trackio is not installed; add it with `pip install gkd-lab\[track"
    ):
        follower(tmp_path, "trackio")


def test_none_follows_nothing(tmp_path: Path) -> None:
    tracker = create_tracker("none", "quickstart", tmp_path, None)  # type: ignore[arg-type]
    assert type(tracker) is Tracker
    with tracker.open_session():
        for cell, record in two_cells(tmp_path):
            tracker.start_run(cell, record)
            tracker.finish_run(record)
    assert list(tmp_path.iterdir()) == []
