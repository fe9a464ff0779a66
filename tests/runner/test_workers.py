"""`--workers N`: processes that share a run without a coordinator, and what their parent makes of them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from gkd_lab.config import Grid
from gkd_lab.runner.workers import WorkerPool, clear_failures, count_worker_threads
from gkd_lab.store import Store

from .tiny_experiments import table_of, tiny_grid

LISTENING = """
import os, signal, sys, time
def leave(number, _):
    print("heard", number, file=sys.stderr, flush=True)
    os._exit(128 + number)
signal.signal(signal.SIGINT, leave)
signal.signal(signal.SIGTERM, leave)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""


def workers(script: str, count: int = 2) -> tuple[WorkerPool, list[str]]:
    said: list[str] = []
    return WorkerPool(count, [sys.executable, "-c", script], said.append), said


def test_lines_carry_the_workers_number_and_a_failure_is_told_once() -> None:
    script = (
        "import os, sys; k = sys.argv[-1];"
        "print('threads', os.environ['OMP_NUM_THREADS'], k, file=sys.stderr);"
        "print('failed: cell 1: why', file=sys.stderr); sys.exit(1 if k == '2/2' else 0)"
    )
    processes, said = workers(script)
    assert processes.wait() == 1
    each = count_worker_threads(2)
    assert sorted(said) == [f"[1] threads {each} 1/2", f"[2] threads {each} 2/2"]
    assert list(processes.failures) == ["failed: cell 1: why"]


def test_a_wrong_request_is_the_worst_status_and_a_killed_worker_is_named() -> None:
    script = "import os, sys; sys.exit(2) if sys.argv[-1] == '1/2' else os.kill(os.getpid(), 9)"
    processes, said = workers(script)
    assert processes.wait() == 2
    assert said == ["[2] was killed by SIGKILL"]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_goes_on_to_every_worker_once(number: signal.Signals) -> None:
    processes, said = workers(LISTENING)

    def send() -> None:
        while said.count("[1] ready") + said.count("[2] ready") < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    assert processes.wait() == 128 + number
    thread.join()
    assert sorted(said[-2:]) == [f"[1] heard {number}", f"[2] heard {number}"]
    assert signal.getsignal(number) is before


def test_cores_are_shared_out_and_a_smaller_number_that_was_asked_for_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [count_worker_threads(n) for n in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [count_worker_threads(n) for n in (1, 2, 8)] == [2, 2, 1]


def test_failures_are_forgotten_once_for_all_workers_but_not_under_anothers_hands(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    store = Store(tmp_path / "outputs")
    first, second, third = (store.get_record(cell) for cell in grid.cells[:3])
    judged = third.get_evaluation(grid.cells[2].evaluations[0])
    for part in (first, second, judged):
        part.mark_failed("ValueError: no")
    third.mark_done()
    with second.lock():
        clear_failures(grid, store)
    assert (first.read_status(), judged.read_status()) == ({}, {})
    assert second.read_status()["state"] == "failed"
    assert third.read_status()["state"] == "done"


def begin(grid: Grid, folder: Path, *words: str) -> "subprocess.Popen[str]":
    """`gkd-lab run --workers 2` in a process of its own."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    command = [sys.executable, "-m", "gkd_lab", "run", f"{grid.name}.yaml", "--workers", "2", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def begun(outputs: Path) -> dict[str, int]:
    """Record -> how often a process began or went on with its training."""
    return {
        path.parent.name: sum("began" in json.loads(line) for line in path.read_text().splitlines())
        for path in outputs.rglob("times.jsonl")
    }


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children() if "--worker" in one.cmdline()]


LONGER = {"grid": {"lmbda": [0, 0.5], "beta": [0, 0.5]}, "evaluations": [{"decoding": "greedy"}]}


@pytest.mark.slow
def test_two_workers_run_every_cell_once(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **LONGER)
    process = begin(grid, tmp_path)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert told.splitlines()[-1] == "tiny: all 4 cells are done"
    assert all(line.startswith(("[1] ", "[2] ")) for line in told.splitlines()[:-1])
    outputs = tmp_path / "outputs"
    assert {row["status"] for row in table_of(grid, outputs)} == {"done"}
    assert sorted(begun(outputs).values()) == [1] * 6
    packs = [Store(outputs).get_record(cell).read_provenance()["pack"] for cell in grid.cells]
    assert [len(pack) for pack in packs] == [2] * 4
    again = begin(grid, tmp_path)
    assert again.communicate()[1] == "tiny: all 4 cells are done\n"


@pytest.mark.slow
def test_what_a_killed_worker_leaves_the_others_finish_from_its_checkpoint(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **{**LONGER, "steps": 400})
    process = begin(grid, tmp_path)
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if "2 cells as one model, distillation: 200 of 400" in line:
            number = int(line[1])
            workers_of(process)[number - 1].kill()
            break
    told += process.stderr.readlines()
    assert process.wait() == 0, told
    assert any(line == f"[{number}] was killed by SIGKILL\n" for line in told)
    outputs = tmp_path / "outputs"
    assert {row["status"] for row in table_of(grid, outputs)} == {"done"}
    resumed = [Store(outputs).get_record(cell).read_provenance()["resumed_at_step"] for cell in grid.cells]
    assert sorted(resumed)[:2] == [0, 0]
    assert all(step >= 100 for step in sorted(resumed)[2:])


@pytest.mark.slow
def test_workers_stop_when_their_parent_is_killed_and_let_their_cells_go(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **{**LONGER, "steps": 5000})
    process = begin(grid, tmp_path)
    assert process.stderr is not None
    next(line for line in process.stderr if "distillation: 0 of 5000" in line)
    left = workers_of(process)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(left, timeout=60)
    assert (len(gone), alive) == (2, [])
    assert not any(Store(tmp_path / "outputs").get_record(cell).is_locked() for cell in grid.cells)
