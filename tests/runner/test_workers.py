"""`--workers N`: worker processes share a run, and their parent relays output, signals and exit status."""

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

from gkd_lab.cli.options import parse_worker_counts
from gkd_lab.config import Grid
from gkd_lab.runner import evaluate_cells
from gkd_lab.runner.devices import list_gpus
from gkd_lab.runner.workers import WorkerPool, clear_failures, count_worker_threads
from gkd_lab.store import Store

from .tiny_experiments import options, table_of, tiny_grid

LISTENING_SCRIPT = """
import os, signal, sys, time
def leave(number, _):
    print("heard", number, file=sys.stderr, flush=True)
    os._exit(128 + number)
signal.signal(signal.SIGINT, leave)
signal.signal(signal.SIGTERM, leave)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""


def start_workers(script: str, count: int = 2) -> tuple[WorkerPool, list[str]]:
    lines: list[str] = []
    return WorkerPool(count, [sys.executable, "-c", script], lines.append), lines


def test_lines_have_worker_numbers_and_failures_are_collected_once() -> None:
    script = (
        "import os, sys; k = sys.argv[-1];"
        "print('threads', os.environ['OMP_NUM_THREADS'], k, file=sys.stderr);"
        "print('failed: cell 1: why', file=sys.stderr); sys.exit(1 if k == '2/2' else 0)"
    )
    pool, lines = start_workers(script)
    assert pool.wait() == 1
    threads = count_worker_threads(2)
    assert sorted(lines) == [f"[1] threads {threads} 1/2", f"[2] threads {threads} 2/2"]
    assert list(pool.failures) == ["failed: cell 1: why"]


def test_exit_status_is_the_worst_and_killed_workers_are_reported() -> None:
    script = "import os, sys; sys.exit(2) if sys.argv[-1] == '1/2' else os.kill(os.getpid(), 9)"
    pool, lines = start_workers(script)
    assert pool.wait() == 2
    assert len(lines) == 1 and lines[0].startswith("[2]") and lines[0].endswith("SIGKILL")


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_signal_is_forwarded_to_each_worker(number: signal.Signals) -> None:
    pool, lines = start_workers(LISTENING_SCRIPT)

    previous_handler = signal.getsignal(number)

    def send() -> None:
        while lines.count("[1] ready") + lines.count("[2] ready") < 2:
            time.sleep(0.02)
        while signal.getsignal(number) is previous_handler:  # until `wait` forwards signals
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert pool.wait() == 128 + number
    thread.join()
    assert sorted(lines[-2:]) == [f"[1] heard {number}", f"[2] heard {number}"]
    assert signal.getsignal(number) is previous_handler


def test_workers_share_cores_within_omp_num_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [count_worker_threads(n) for n in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [count_worker_threads(n) for n in (1, 2, 8)] == [2, 2, 1]


def test_failures_are_cleared_except_in_locked_records(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    store = Store(tmp_path / "outputs")
    first, second, third = (store.get_record(cell) for cell in grid.cells[:3])
    evaluation_record = third.get_evaluation(grid.cells[2].evaluations[0])
    for record in (first, second, evaluation_record):
        record.mark_failed("ValueError: no")
    third.mark_done()
    with second.lock():
        clear_failures(grid, store)
    assert (first.read_status(), evaluation_record.read_status()) == ({}, {})
    assert second.read_status()["state"] == "failed"
    assert third.read_status()["state"] == "done"


def start_run(grid: Grid, folder: Path, *words: str) -> "subprocess.Popen[str]":
    """Start `gkd-lab run --workers 2` in a new process."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    command = [sys.executable, "-m", "gkd_lab", "run", f"{grid.name}.yaml", "--workers", "2", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def count_process_starts(outputs: Path) -> dict[str, int]:
    """Return record -> number of processes that started or resumed its training."""
    return {
        path.parent.name: sum("began" in json.loads(line) for line in path.read_text().splitlines())
        for path in outputs.rglob("times.jsonl")
    }


def find_worker_processes(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "--worker" in child.cmdline()]


LONGER_RUN = {"grid": {"lmbda": [0, 0.5], "beta": [0, 0.5]}, "evaluations": [{"decoding": "greedy"}]}


@pytest.mark.slow
def test_two_workers_run_every_cell_once(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **LONGER_RUN)
    process = start_run(grid, tmp_path)
    _, output = process.communicate()
    assert process.returncode == 0, output
    assert "all 4 cells are done" in output.splitlines()[-1]
    ahead, loading, *lines = output.splitlines()[:-1]
    assert ahead.startswith("tiny: 4 missing; left to do: ") and loading.startswith("tiny: loading torch")
    assert all(line.startswith(("[1] ", "[2] ")) for line in lines)
    outputs = tmp_path / "outputs"
    assert {row["status"] for row in table_of(grid, outputs)} == {"done"}
    assert sorted(count_process_starts(outputs).values()) == [1] * 6
    packs = [Store(outputs).get_record(cell).read_provenance()["pack"] for cell in grid.cells]
    assert [len(pack) for pack in packs] == [2] * 4
    second_process = start_run(grid, tmp_path)
    (line,) = second_process.communicate()[1].splitlines()
    assert "all 4 cells are done" in line


@pytest.mark.slow
def test_other_workers_resume_the_cells_of_a_killed_worker(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **{**LONGER_RUN, "steps": 400})
    process = start_run(grid, tmp_path)
    assert process.stderr is not None
    output = []
    for line in process.stderr:
        output.append(line)
        if "distillation: 200 of 400" in line:
            number = int(line[1])
            find_worker_processes(process)[number - 1].kill()
            break
    output += process.stderr.readlines()
    assert process.wait() == 0, output
    assert any(line.startswith(f"[{number}]") and "SIGKILL" in line for line in output)
    outputs = tmp_path / "outputs"
    assert {row["status"] for row in table_of(grid, outputs)} == {"done"}
    resumed = [Store(outputs).get_record(cell).read_provenance()["resumed_at_step"] for cell in grid.cells]
    assert sorted(resumed)[:2] == [0, 0]
    assert all(step >= 100 for step in sorted(resumed)[2:])


@pytest.mark.slow
def test_workers_stop_and_release_cells_when_their_parent_is_killed(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **{**LONGER_RUN, "steps": 5000})
    process = start_run(grid, tmp_path)
    assert process.stderr is not None
    next(line for line in process.stderr if "distillation: 0 of 5000" in line)
    worker_processes = find_worker_processes(process)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(worker_processes, timeout=60)
    assert (len(gone), alive) == (2, [])
    assert not any(Store(tmp_path / "outputs").get_record(cell).is_locked() for cell in grid.cells)


SHOW_GPU = """
import os, sys
names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
print(*map(os.environ.get, names), sys.argv[-1], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["0", "1", "2", "3"]),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, ["2", "3"]),
        ({"CUDA_VISIBLE_DEVICES": " GPU-8f, GPU-90 "}, ["GPU-8f", "GPU-90"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1a", "HIP_VISIBLE_DEVICES": "7"}, ["MIG-1a"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, ["1"]),
    ],
)
def test_gpus_of_a_run_are_those_that_it_may_see(environment: dict[str, str], expected: list[str]) -> None:
    visible = next(iter(environment.values()), "0,1,2,3")
    assert list_gpus(environment, lambda: len(visible.split(","))) == expected
    assert list_gpus(environment, lambda: 0) == [], "hidden, or none there"


def test_workers_get_gpus_of_their_own_round_robin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8f")
    gpus = list_gpus(count_devices=lambda: 2)
    lines: list[str] = []
    pool = WorkerPool(5, [sys.executable, "-c", SHOW_GPU], lines.append, gpus)
    assert pool.wait() == 0
    assert sorted(lines) == [
        "[1] 4 None 1/5/3",
        "[2] GPU-8f None 2/5/2",
        "[3] 4 None 3/5/3",
        "[4] GPU-8f None 4/5/2",
        "[5] 4 None 5/5/3",
    ]


def test_workers_of_hip_get_their_gpus_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1")
    lines: list[str] = []
    pool = WorkerPool(2, [sys.executable, "-c", SHOW_GPU], lines.append, list_gpus(count_devices=lambda: 2))
    assert pool.wait() == 0
    assert sorted(lines) == ["[1] None 0 1/2/1", "[2] None 1 2/2/1"]


def test_workers_without_gpus_keep_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pool, lines = start_workers(SHOW_GPU)
    assert pool.wait() == 0
    assert sorted(lines) == ["[1]  None 1/2", "[2]  None 2/2"]


@pytest.mark.parametrize(
    ("text", "counts"), [(None, (1, 1)), ("2/5", (5, 5)), ("2/5/3", (5, 3)), ("1/1/1", (1, 1))]
)
def test_memory_of_a_gpu_is_shared_by_its_own_workers_only(text: str | None, counts: tuple[int, int]) -> None:
    workers, workers_on_gpu = parse_worker_counts(text)
    assert (workers, workers_on_gpu) == counts
    run_options = options(Path("outputs"), workers=workers, workers_on_gpu=workers_on_gpu)
    assert run_options.count_sharing_workers("cpu") == counts[0]
    assert run_options.count_sharing_workers("cuda") == counts[1]


def test_pack_of_a_worker_takes_its_share_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of six workers share the GPU, all six the main memory."""
    gib = 2**30
    free = {"cpu": 60 * gib, "cuda": 10 * gib}
    monkeypatch.setattr(evaluate_cells, "measure_free_bytes", free.__getitem__)
    monkeypatch.setattr(evaluate_cells, "select_device", lambda: "cuda")
    grid = tiny_grid(tmp_path, "arithmetic")
    run_options = options(tmp_path / "outputs", workers=6, workers_on_gpu=2)
    checkpoint = run_options.store.get_record(grid.cells[0]).checkpoint
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"12345")
    assert evaluate_cells._measure_evaluation_bytes(grid.cells, run_options) == (10, 5 * gib)
    free["cpu"] = 6 * gib
    assert evaluate_cells._measure_evaluation_bytes(grid.cells, run_options) == (10, gib)
