"""`wandb sweep` and `wandb agent` run each cell of a grid once through `gkd-lab cell`."""

import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from gkd_lab.cli import main
from gkd_lab.config import Grid
from gkd_lab.config.cell import list_references
from gkd_lab.runner.progress import Reporter, silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store

from ..wandb_server import Run, Server, list_sweep_points, run_server
from .agents import Shell
from .tiny_experiments import options, table_of, tiny_grid
from .tracked_script import SCORES, connect_wandb, create_recorded_tracker, write_rows

TINY_CHANGES: dict[str, Any] = {"evaluations": [{"decoding": "greedy"}], "steps": 40}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with run_server() as server:
        yield Shell(server, tmp_path)
    assert server.unknown == []


def write_records(grid: Grid, outputs: Path) -> None:
    """Write every record of the grid, as a run does."""
    store = Store(outputs)
    for role, model, cells in list_references(grid.cells):
        record = store.get_artifact(grid.scale, role, model)
        record.finish()
        for evaluation in cells[0].evaluations:
            record.get_evaluation(evaluation).write_results(evaluation, [], SCORES)
    for cell in grid.cells:
        record = store.get_record(cell)
        write_rows(record, 20, 40)
        record.finish(steps=40)
        for evaluation in cell.evaluations:
            record.get_evaluation(evaluation).write_results(evaluation, [], SCORES)


def list_tracked_cells(server: Server) -> list[str]:
    return sorted(tracked_run.config["cell"] for tracked_run in server.runs.values())


def find_tracked_cell(grid: Grid, tracked_run: Run) -> Any:
    (cell,) = (cell for cell in grid.cells if cell.full_fingerprint == tracked_run.config["fingerprint"])
    return cell


def check_done(grid: Grid, server: Server, outputs: Path) -> None:
    """Check that each run equals the record of its cell and has the parameters of the sweep."""
    for tracked_run in server.runs.values():
        cell = find_tracked_cell(grid, tracked_run)
        record = Store(outputs).get_record(cell)
        parameters = server.handed_out[tracked_run.id]
        assert {name: tracked_run.config[name] for name in parameters} == parameters
        assert cell.lmbda == parameters["lmbda"]
        assert (tracked_run.exit_code, tracked_run.summary["status"]) == (0, "done")
        *training_rows, score_row = tracked_run.history
        assert [{"step": row.pop("_step"), **row} for row in training_rows] == record.read_history()
        assert score_row["greedy/accuracy"] == tracked_run.summary["greedy/accuracy"]


def test_agent_replays_finished_cells(shell: Shell) -> None:
    """Real `wandb sweep` and `wandb agent`; no torch, so that a cell takes about a second."""
    grid = tiny_grid(shell.folder, "arithmetic", grid={"lmbda": [0, 1.0]}, **TINY_CHANGES)
    write_records(grid, shell.outputs)
    sweep = shell.sweep("tiny.yaml")
    done = shell.agent(sweep)
    assert done.returncode == 0, done.stderr
    assert list_tracked_cells(shell.server) == sorted(cell.fingerprint for cell in grid.cells)
    assert {tracked_run.sweep for tracked_run in shell.server.runs.values()} == {sweep.rsplit("/", 1)[-1]}
    check_done(grid, shell.server, shell.outputs)


@pytest.mark.slow
def test_two_agents_run_each_cell_of_a_grid_once(shell: Shell) -> None:
    """Two concurrent agents on an empty store build each model and train each cell once."""
    grid = tiny_grid(shell.folder, "arithmetic", grid={"lmbda": [0, 0.5, 1.0]}, **TINY_CHANGES)
    sweep = shell.sweep("tiny.yaml")
    agents = [shell.agent_beside(sweep) for _ in range(2)]
    assert [agent.wait(600) for agent in agents] == [0, 0]
    assert list_tracked_cells(shell.server) == sorted(cell.fingerprint for cell in grid.cells)
    check_done(grid, shell.server, shell.outputs)
    assert {row["status"] for row in table_of(grid, shell.outputs)} == {"done"}
    packs = [Store(shell.outputs).get_record(cell).read_provenance()["pack"] for cell in grid.cells]
    assert packs == [[cell.fingerprint] for cell in grid.cells]


@pytest.mark.slow
def test_random_sweep_trains_a_repeated_cell_once(shell: Shell) -> None:
    grid = tiny_grid(shell.folder, "arithmetic", grid={"lmbda": [0, 1.0]}, **TINY_CHANGES)
    sweep = shell.sweep("tiny.yaml", method="random", run_cap=3)
    assert shell.agent(sweep).returncode == 0
    drawn_points = list_sweep_points(
        {"method": "random", "run_cap": 3, "parameters": {"lmbda": {"values": [0, 1]}}}
    )
    assert [parameters["lmbda"] for parameters in shell.server.handed_out.values()] == [
        tracked_run["lmbda"] for tracked_run in drawn_points
    ]
    assert len(set(list_tracked_cells(shell.server))) == 2
    assert len(shell.server.runs) == 3
    check_done(grid, shell.server, shell.outputs)


@pytest.mark.slow
def test_next_agent_resumes_the_cell_of_a_killed_agent(shell: Shell) -> None:
    """The agent is killed with its child after the checkpoint of step 100."""
    grid = tiny_grid(shell.folder, "arithmetic", grid={"lmbda": [0.5]}, **{**TINY_CHANGES, "steps": 400})
    (cell,) = grid.cells
    record = Store(shell.outputs).get_record(cell)
    agent = shell.agent_beside(shell.sweep("tiny.yaml"))
    try:
        wait_until(lambda: any(row["step"] >= 120 for row in record.read_history()))
    finally:
        kill_all(agent)
    assert record.read_status() == {}
    first = len(shell.server.runs)
    assert shell.agent(shell.sweep("tiny.yaml")).returncode == 0
    assert record.read_status()["state"] == "done"
    assert record.read_provenance()["resumed_at_step"] >= 100
    assert [row["step"] for row in record.read_history()] == list(range(20, 401, 20))
    tracked_run = list(shell.server.runs.values())[first]
    assert [row["_step"] for row in tracked_run.history] == [*range(20, 401, 20), 401]
    assert tracked_run.exit_code == 0


def wait_until(condition: Callable[[], bool], seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its descendants, as if the machine had stopped."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def agent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Test server, with this process as a child of an agent for the run `run0` of `sweep0`."""
    home = tmp_path / "home"
    agent_variables = {"WANDB_SWEEP_ID": "sweep0", "WANDB_RUN_ID": "run0", "WANDB_PROJECT": "gkd-lab"}
    with run_server() as server, connect_wandb(server, home, monkeypatch, **agent_variables):
        yield server


def test_agents_run_has_the_error_of_a_failed_cell_or_teacher(tmp_path: Path, agent_server: Server) -> None:
    silence_libraries()
    outputs = tmp_path / "outputs"
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, **TINY_CHANGES)
    write_records(grid, outputs)
    record = Store(outputs).get_record(grid.cells[0])
    record.mark_failed("FloatingPointError: nan")
    assert run_grid(grid, options(outputs, tracker=create_recorded_tracker(outputs)[0])).failures
    tracked_run = agent_server.runs["run0"]
    assert (tracked_run.exit_code, tracked_run.summary["status"]) == (1, "failed")
    assert tracked_run.summary["error"] == "FloatingPointError: nan"
    role, model, _ = list_references(grid.cells)[0]
    Store(outputs).get_artifact("nano", role, model).mark_failed("ValueError: no rows")
    assert run_grid(grid, options(outputs, tracker=create_recorded_tracker(outputs)[0])).failures
    assert "teacher failed: ValueError: no rows" in tracked_run.summary["error"]


def test_locked_cell_is_skipped_or_waited_for(tmp_path: Path, agent_server: Server) -> None:
    outputs = tmp_path / "outputs"
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, **TINY_CHANGES)
    write_records(grid, outputs)
    (cell,) = grid.cells
    record = Store(outputs).get_record(cell)
    finished_status = record.read_status()
    record.status_file.unlink()
    is_locked, may_finish = threading.Event(), threading.Event()

    def work_on_cell() -> None:
        with record.lock():
            is_locked.set()
            may_finish.wait()
            time.sleep(1.5)  # long enough for the waiting process to print that it waits
            record.mark_done(**{name: value for name, value in finished_status.items() if name != "state"})

    thread = threading.Thread(target=work_on_cell)
    thread.start()
    is_locked.wait()
    outcome = run_grid(grid, options(outputs, tracker=create_recorded_tracker(outputs)[0]))
    assert outcome.busy_cell_count == 1
    tracked_run = agent_server.runs["run0"]
    assert (tracked_run.exit_code, tracked_run.summary["status"]) == (0, "elsewhere")
    may_finish.set()
    output = io.StringIO()
    reporter = Reporter(Console(file=output, width=500))
    outcome = run_grid(
        grid, options(outputs, reporter, tracker=create_recorded_tracker(outputs)[0], busy_cells="wait")
    )
    thread.join()
    assert output.getvalue().count("\n") == 1
    assert "waiting" in output.getvalue() and cell.fingerprint in output.getvalue()
    assert (outcome.failures, outcome.busy_cell_count) == ([], 0)
    assert (tracked_run.exit_code, tracked_run.summary["status"]) == (0, "done")
    assert tracked_run.summary["greedy/accuracy"] == SCORES["accuracy"]["value"]


def test_agents_run_has_the_error_of_invalid_parameters(
    agent_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["cell", "--experiment", "quickstart", "--lmbda=2", "--beta=0"])
    assert caught.value.code == 2
    tracked_run = agent_server.runs["run0"]
    assert (tracked_run.exit_code, tracked_run.summary["status"]) == (2, "failed")
    assert "2 is not valid" in tracked_run.summary["error"]


def test_sweep_agent_cannot_run_a_grid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep0")
    with pytest.raises(SystemExit) as caught:
        main(["run", "quickstart"])
    assert caught.value.code == 2
    assert "`gkd-lab cell`" in capsys.readouterr().err
