"""Many processes on one store, and a large store: does every cell run once, and how fast is it listed?

    python benchmarks/load.py [--small] [-o FILE.json]

Part 1: 8 processes, each with the run's own loop, claims and records, share 500 cells. Training and judging
are stubs that write a tiny record; each notes the cell that it ran, so that one that ran twice is seen.
Part 2: the whole commands `status` and `table` over 10,000 finished records. Cold: no index, and the files
are dropped from the page cache (their names and inodes stay); warm: again. `plain_s` reads the same files in
a loop. `--small` takes 50 cells and 1,000 records.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from gkd_lab import experiments
from gkd_lab.config import Cell, Grid
from gkd_lab.config.cell import Evaluation, list_references
from gkd_lab.store import Record, Store

PROCESSES = 8
TARGETS = {"run_s": 60.0, "status_warm": 2.0, "table_warm": 2.0}
"""Seconds for 500 cells and for 10,000 records on 2 cores."""
LISTED_FILES = ("status.json", "scores.json", "metrics.jsonl")
SCORES = {"accuracy": {"value": 71.2, "low": 67.0, "high": 75.4, "n": 500, "signature": "made"}}


def build_grid(folder: Path, cells: int) -> tuple[Path, Grid]:
    """lmbda x beta x seed on arithmetic: `cells` of them, a multiple of 25."""
    quarters, betas = [0, 0.25, 0.5, 0.75, 1], [0, 0.1, 0.5, 0.9, 1]
    axes = {"lmbda": quarters, "beta": betas, "seed": [*range(cells // 25)]}
    document = {
        **{"description": "load", "task": "arithmetic", "grid": axes},
        "evaluations": [{"decoding": "greedy", "metrics": ["accuracy"]}],
    }
    path = folder / f"load{cells}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path, experiments.load(str(path), outputs=folder / "outputs")


def write_record(record: Record, cell: Cell) -> None:
    """A tiny record with a history, a checkpoint and an evaluation."""
    record.rewind_history(0)
    for step in (200, 400):
        record.log_row({"step": step, "loss": 1 / step, "on_policy": cell.lmbda, "completion_length": 9.0})
    record.checkpoint.mkdir(exist_ok=True)
    (record.checkpoint / "model.safetensors").write_bytes(b"weights")
    record.write_provenance({"python": platform.python_version()})
    record.finish(steps=400, tokens=3600, shared_by=1, device="cpu")
    write_evaluation(record, cell)


def write_evaluation(record: Record, cell: Cell) -> None:
    for evaluation in cell.evaluations:
        assert isinstance(evaluation, Evaluation)
        record.get_evaluation(evaluation).write_results(evaluation, [], SCORES, rows=0)


def finish_references(grid: Grid, store: Store) -> None:
    """Teacher and start, which nobody has to build."""
    for role, model, cells in list_references(grid.cells):
        record = store.get_artifact(grid.scale, role, model)
        record.write_spec(model, role=role)
        record.finish(parameters=1000)
        write_evaluation(record, cells[0])


def run_process(grid: Grid, outputs: Path) -> int:
    """What one process does: run the grid until nothing is left; how many times it went through."""
    from rich.console import Console

    import gkd_lab.runner.run as runs
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.run_options import RunOptions

    def train(cells: Sequence[Cell], options: Any) -> None:
        for cell in cells:
            record = options.store.of(cell)
            if not record.status():
                record.describe(cell.training, scale=cell.scale, labels=cell.labels)
                with (outputs / "ran.log").open("a") as log:
                    log.write(f"{cell.full_fingerprint}\n")
                write_record(record, cell)

    runs.train, runs.evaluate_cells = train, lambda cells, options: None  # type: ignore[assignment]
    options = RunOptions(outputs, pack="off", reporter=Reporter(Console(quiet=True)), busy_cells="pass")
    rounds = 1
    while runs.run(grid, options).busy_cell_count:
        rounds += 1
    return rounds


def many_processes(folder: Path, cells: int) -> dict[str, Any]:
    """Forked after the libraries were imported, which takes longer than the work."""
    import gkd_lab.runner.run  # noqa: F401

    _, grid = build_grid(folder, cells)
    outputs = folder / "outputs"
    finish_references(grid, Store(outputs))
    began, children = time.perf_counter(), []
    for _ in range(PROCESSES):
        pid = os.fork()
        if not pid:
            try:
                run_process(grid, outputs)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    states = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    seconds = time.perf_counter() - began
    ran = Counter((outputs / "ran.log").read_text().split())
    done = sum(Store(outputs).get_record(cell).read_state() == "done" for cell in grid.cells)
    found = {"cells": cells, "processes": PROCESSES, "done": done, "ran": sum(ran.values())}
    twice = sum(count > 1 for count in ran.values())
    return {
        **found,
        "ran_twice": twice,
        "failed_processes": sum(map(bool, states)),
        "run_s": round(seconds, 2),
    }


def large_store(folder: Path, records: int) -> dict[str, Any]:
    """One record through its own interface, then copies of its files for all other cells."""
    path, grid = build_grid(folder, records)
    outputs = folder / "outputs"
    store = Store(outputs)
    finish_references(grid, store)
    first = store.get_record(grid.cells[0])
    first.write_spec(grid.cells[0].training)
    write_record(first, grid.cells[0])
    for cell in grid.cells[1:]:
        shutil.copytree(first.folder, store.get_record(cell).folder, copy_function=copy_record_file)
    time.sleep(2.5)  # the index takes no file that was written just now
    plain = min(measure_plain_loop(grid, store) for _ in range(3))
    found: dict[str, Any] = {"records": records, "plain_s": round(plain, 2)}
    for command in ("status", "table"):
        shutil.rmtree(outputs / ".cache", ignore_errors=True)
        drop_page_cache(grid, store)
        found[f"{command}_cold"] = measure_command(command, path, outputs)
        again = [measure_command(command, path, outputs) for _ in range(3)]
        found[f"{command}_warm"] = min(again, key=lambda one: one["wall_s"])
    return found


def copy_record_file(source: str, target: str) -> None:
    """What a listing reads as a file of its own; the rest is one file under many names."""
    (shutil.copyfile if Path(source).name in LISTED_FILES else os.link)(source, target)


def measure_plain_loop(grid: Grid, store: Store) -> float:
    """Seconds to open and parse a cell's two statuses and its scores, of all cells."""
    began = time.perf_counter()
    for cell in grid.cells:
        folder = f"{store.root}/{cell.folder}"
        judged = f"{folder}/evaluations/{cell.evaluations[0].folder}"
        for name in (f"{folder}/status.json", f"{judged}/status.json", f"{judged}/scores.json"):
            with open(name, "rb") as file:
                json.loads(file.read())
    return time.perf_counter() - began


def drop_page_cache(grid: Grid, store: Store) -> None:
    """Forget the content of what is read, as far as the system lets a user do that."""
    os.sync()
    for cell in grid.cells:
        judged = f"evaluations/{cell.evaluations[0].folder}"
        for name in ("status.json", "metrics.jsonl", f"{judged}/status.json", f"{judged}/scores.json"):
            with open(f"{store.root}/{cell.folder}/{name}", "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_command(command: str, path: Path, outputs: Path) -> dict[str, float]:
    """The whole command, imports included; `cpu_s` stays comparable while other work keeps the cores busy."""
    words = [sys.executable, "-m", "gkd_lab", command, str(path), "--outputs", str(outputs)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    taken, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(taken, 2), "cpu_s": round(spent, 2)}


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="50 cells, 1,000 records")
    parser.add_argument("-o", type=Path, default=None, help="a JSON file for the figures")
    parser.add_argument("--only", choices=("processes", "store"), default=None, help="one of the parts")
    options = parser.parse_args()
    cells, records = (50, 1000) if options.small else (500, 10_000)
    found: dict[str, Any] = {}
    parts = {"processes": (many_processes, cells), "store": (large_store, records)}
    for part, size in parts.values() if options.only is None else [parts[options.only]]:
        with tempfile.TemporaryDirectory() as folder:
            found[part.__name__] = part(Path(folder), size)
        print(json.dumps(found[part.__name__]), flush=True)
    if options.o:
        versions = {package: version(package) for package in ("filelock", "pydantic", "pandas")}
        facts = {"device": platform.machine(), "cpus": os.cpu_count(), "versions": versions}
        load = {"load_average_at_the_end": os.getloadavg()[0]}
        options.o.write_text(json.dumps({**facts, **load, **found, "targets": TARGETS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
