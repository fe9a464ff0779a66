"""wandb's real `sweep` and `agent` run a grid through `gkd-lab cell`: each cell once, whatever happens."""

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
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store

from ..wandb_server import Run, Server, points_of, serving
from .agents import Shell
from .tiny_experiments import options, table_of, tiny_grid
from .tracked_script import SCORES, follower, wandb_meeting, write_rows

ONE: dict[str, Any] = {"evaluations": [{"decoding": "greedy"}], "steps": 40}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with serving() as server:
        yield Shell(server, tmp_path)
    assert server.unknown == []


def finish_by_hand(grid: Grid, outputs: Path) -> None:
    """Every record of the grid as if it had been run."""
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


def cells_of(server: Server) -> list[str]:
    return sorted(one.config["cell"] for one in server.runs.values())


def cell_of(grid: Grid, found: Run) -> Any:
    (cell,) = (cell for cell in grid.cells if cell.full_fingerprint == found.config["fingerprint"])
    return cell


def check_done(grid: Grid, server: Server, outputs: Path) -> None:
    """Each run says what the record of its cell says, and keeps the parameters that it was given."""
    for found in server.runs.values():
        cell = cell_of(grid, found)
        record = Store(outputs).get_record(cell)
        given = server.handed_out[found.id]
        assert {name: found.config[name] for name in given} == given
        assert cell.lmbda == given["lmbda"]
        assert (found.exit_code, found.summary["status"]) == (0, "done")
        *trained, judged = found.history
        assert [{"step": row.pop("_step"), **row} for row in trained] == record.read_history()
        assert judged["greedy/accuracy"] == found.summary["greedy/accuracy"]


def test_an_agent_replays_what_is_done_and_trains_nothing(shell: Shell) -> None:
    """Real `wandb sweep` and `wandb agent`; no torch, so that a cell takes about a second."""
    grid = tiny_grid(shell.folder, "arithmetic", grid={"lmbda": [0, 1.0]}, **ONE)
    finish_by_hand(grid, shell.outputs)
    sweep = shell.sweep("tiny.yaml")
    done = shell.agent(sweep)
    assert done.returncode == 0, done.stderr
    assert cells_of(shell.server) == sorted(cell.fingerprint for cell in grid.cells)
    assert {found.sweep for found in shell.server.runs.values()} == {sweep.rsplit("/", 1)[-1]}
    check_done(grid, shell.server, shell.outputs)


@pytest.mark.slow
def test_a_grid_run_by_two_agents_is_the_experiment(shell: Shell) -> None:
    """Both at once on an empty store: the models are built once, each cell is trained once."""
    grid = tiny_grid(shell.folder, "arithmetic", grid={"lmbda": [0, 0.5, 1.0]}, **ONE)
    sweep = shell.sweep("tiny.yaml")
    agents = [shell.agent_beside(sweep) for _ in range(2)]
    assert [agent.wait(600) for agent in agents] == [0, 0]
    assert cells_of(shell.server) == sorted(cell.fingerprint for cell in grid.cells)
    check_done(grid, shell.server, shell.outputs)
    assert {row["status"] for row in table_of(grid, shell.outputs)} == {"done"}
    packs = [Store(shell.outputs).get_record(cell).read_provenance()["pack"] for cell in grid.cells]
    assert packs == [[cell.fingerprint] for cell in grid.cells]


@pytest.mark.slow
def test_a_random_sweep_that_draws_a_cell_twice_trains_it_once(shell: Shell) -> None:
    grid = tiny_grid(shell.folder, "arithmetic", grid={"lmbda": [0, 1.0]}, **ONE)
    sweep = shell.sweep("tiny.yaml", method="random", run_cap=3)
    assert shell.agent(sweep).returncode == 0
    drawn = points_of({"method": "random", "run_cap": 3, "parameters": {"lmbda": {"values": [0, 1]}}})
    assert [given["lmbda"] for given in shell.server.handed_out.values()] == [one["lmbda"] for one in drawn]
    assert len(set(cells_of(shell.server))) == 2
    assert len(shell.server.runs) == 3
    check_done(grid, shell.server, shell.outputs)


@pytest.mark.slow
def test_a_cell_whose_agent_was_killed_is_undone_and_the_next_agent_takes_it(shell: Shell) -> None:
    """Killed with its child after the checkpoint of step 100; the next one goes on from there."""
    grid = tiny_grid(shell.folder, "arithmetic", grid={"lmbda": [0.5]}, **{**ONE, "steps": 400})
    (cell,) = grid.cells
    record = Store(shell.outputs).get_record(cell)
    agent = shell.agent_beside(shell.sweep("tiny.yaml"))
    try:
        until(lambda: any(row["step"] >= 120 for row in record.read_history()))
    finally:
        kill_all(agent)
    assert record.read_status() == {}
    first = len(shell.server.runs)
    assert shell.agent(shell.sweep("tiny.yaml")).returncode == 0
    assert record.read_status()["state"] == "done"
    assert record.read_provenance()["resumed_at_step"] >= 100
    assert [row["step"] for row in record.read_history()] == list(range(20, 401, 20))
    found = list(shell.server.runs.values())[first]
    assert [row["_step"] for row in found.history] == [*range(20, 401, 20), 401]
    assert found.exit_code == 0


def until(condition: Callable[[], bool], seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """As a machine does that goes down."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def agents_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """This process is what an agent started for the run `run0` of `sweep0`."""
    home = tmp_path / "home"
    mine = {"WANDB_SWEEP_ID": "sweep0", "WANDB_RUN_ID": "run0", "WANDB_PROJECT": "gkd-lab"}
    with serving() as server, wandb_meeting(server, home, monkeypatch, **mine):
        yield server


def test_a_failed_cell_and_a_failed_teacher_tell_the_agents_run_why(
    tmp_path: Path, agents_run: Server
) -> None:
    silence_libraries()
    outputs = tmp_path / "outputs"
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, **ONE)
    finish_by_hand(grid, outputs)
    record = Store(outputs).get_record(grid.cells[0])
    record.mark_failed("FloatingPointError: the loss is nan at step 7")
    assert run_grid(grid, options(outputs, tracker=follower(outputs)[0])).failures
    found = agents_run.runs["run0"]
    assert (found.exit_code, found.summary["status"]) == (1, "failed")
    assert found.summary["error"] == "FloatingPointError: the loss is nan at step 7"
    role, model, _ = list_references(grid.cells)[0]
    Store(outputs).get_artifact("nano", role, model).mark_failed("ValueError: no rows")
    assert run_grid(grid, options(outputs, tracker=follower(outputs)[0])).failures
    assert found.summary["error"].startswith("the teacher failed: ValueError: no rows")


def test_a_cell_that_another_process_holds_is_passed_over_or_waited_for(
    tmp_path: Path, agents_run: Server
) -> None:
    outputs = tmp_path / "outputs"
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, **ONE)
    finish_by_hand(grid, outputs)
    (cell,) = grid.cells
    record = Store(outputs).get_record(cell)
    verdict = record.read_status()
    record.status_file.unlink()
    held, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with record.lock():
            held.set()
            go_on.wait()
            time.sleep(1.5)  # long enough for the one that waits to say so
            record.mark_done(**{name: value for name, value in verdict.items() if name != "state"})

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    outcome = run_grid(grid, options(outputs, tracker=follower(outputs)[0]))
    assert outcome.busy_cell_count == 1
    found = agents_run.runs["run0"]
    assert (found.exit_code, found.summary["status"]) == (0, "elsewhere")
    go_on.set()
    told = io.StringIO()
    reporter = Reporter(Console(file=told, width=500))
    outcome = run_grid(grid, options(outputs, reporter, tracker=follower(outputs)[0], busy_cells="wait"))
    thread.join()
    assert told.getvalue() == f"waiting for another process that works on the cell {cell.fingerprint}\n"
    assert (outcome.failures, outcome.busy_cell_count) == ([], 0)
    assert (found.exit_code, found.summary["status"]) == (0, "done")
    assert found.summary["greedy/accuracy"] == SCORES["accuracy"]["value"]


def test_parameters_that_make_no_cell_tell_the_agents_run_why(
    agents_run: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["cell", "--experiment", "quickstart", "--lmbda=2", "--beta=0"])
    assert caught.value.code == 2
    found = agents_run.runs["run0"]
    assert (found.exit_code, found.summary["status"]) == (2, "failed")
    assert "2 is not valid: must be from 0 to 1" in found.summary["error"]


def test_an_agents_run_is_one_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep0")
    with pytest.raises(SystemExit) as caught:
        main(["run", "quickstart"])
    assert caught.value.code == 2
    assert "a sweep agent's run is one cell: let it call `gkd-lab cell`" in capsys.readouterr().err
