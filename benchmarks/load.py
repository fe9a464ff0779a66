"""Check that many processes on one store run each cell once, and time the commands that list a large store.

    python benchmarks/load.py [--small | --smoke] [-o FILE.json]

Part 1: 8 processes share 500 cells by the loop, locks and records of a run. Training and evaluation are stubs
that write a tiny record; each logs its cell, so that a cell that runs twice is detected. Part 2: the commands
`status`, `table --format json` and the same with `--long` over 10,000 finished records. Cold: no index, and
the files are dropped from the page cache (their names and inodes stay); warm: again. `plain_s` reads the same
files in a loop.
`--small`: 50 cells and 1,000 records; `--smoke`: 25 and 100.
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
COMMANDS = {
    "status": ["status"],
    "table": ["table", "--format", "json"],
    "long_table": ["table", "--format", "json", "--long"],
}
"""Seconds for 500 cells and for 10,000 records on 2 cores."""
LISTED_FILES = ("status.json", "scores.json", "metrics.jsonl")
SCORES = {"accuracy": {"value": 71.2, "low": 67.0, "high": 75.4, "n": 500, "signature": "made"}}


def build_grid(folder: Path, cells: int) -> tuple[Path, Grid]:
    """Return a grid of lmbda x beta x seed on arithmetic with `cells` cells, a multiple of 25."""
    lmbdas, betas = [0, 0.25, 0.5, 0.75, 1], [0, 0.1, 0.5, 0.9, 1]
    axes = {"lmbda": lmbdas, "beta": betas, "seed": [*range(cells // 25)]}
    document = {
        **{"description": "load", "task": "arithmetic", "grid": axes},
        "evaluations": [{"decoding": "greedy", "metrics": ["accuracy"]}],
    }
    path = folder / f"load{cells}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path, experiments.load(str(path), outputs=folder / "outputs")


def write_record(record: Record, cell: Cell) -> None:
    """Write a tiny record with a history, a checkpoint and an evaluation."""
    record.rewind_history(0)
    for step in (200, 400):
        record.log_row({"step": step, "loss": 1 / step, "on_policy": cell.lmbda, "completion_length": 9.0})
    record.checkpoint.mkdir(exist_ok=True)
    (record.checkpoint / "model.safetensors").write_bytes(b"weights")
    record.write_provenance({"python": platform.python_version()})
    record.finish(steps=400, tokens=3600, shared_by=1, device="cpu")
    write_evaluation(record, cell)


def write_evaluation(record: Record, cell: Cell) -> None:
    """Write scores without predictions for each evaluation of a cell."""
    for evaluation in cell.evaluations:
        assert isinstance(evaluation, Evaluation)
        record.get_evaluation(evaluation).write_results(evaluation, [], SCORES, rows=0)


def finish_references(grid: Grid, store: Store) -> None:
    """Write finished records of the teacher and the SFT student, so that no process builds them."""
    for role, model, cells in list_references(grid.cells):
        record = store.get_artifact(grid.scale, role, model)
        record.write_spec(model, role=role)
        record.finish(parameters=1000)
        write_evaluation(record, cells[0])


def run_process(grid: Grid, outputs: Path) -> None:
    """Run the grid with stubs, as one process does, until no cell is left to other processes."""
    from rich.console import Console

    from gkd_lab.runner import run
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.run_options import RunOptions

    def write_cells(cells: Sequence[Cell], options: RunOptions) -> None:
        for cell in cells:
            record = options.store.get_record(cell)
            if not record.read_status():
                record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
                with (outputs / "ran.log").open("a") as log:
                    log.write(f"{cell.full_fingerprint}\n")
                write_record(record, cell)

    run.train_cells, run.evaluate_cells = write_cells, lambda cells, options: None
    options = RunOptions(outputs, pack="off", reporter=Reporter(Console(quiet=True)), busy_cells="pass")
    while run.run_grid(grid, options).busy_cell_count:
        pass


def measure_processes(folder: Path, cells: int) -> dict[str, Any]:
    """Measure how long the processes take; they are forked after the slow import of the libraries."""
    import gkd_lab.runner.run  # noqa: F401

    _, grid = build_grid(folder, cells)
    outputs = folder / "outputs"
    finish_references(grid, Store(outputs))
    start, children = time.perf_counter(), []
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
    exit_statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    seconds = time.perf_counter() - start
    runs = Counter((outputs / "ran.log").read_text().split())
    return {
        "cells": cells,
        "processes": PROCESSES,
        "done": sum(Store(outputs).get_record(cell).read_state() == "done" for cell in grid.cells),
        "ran": sum(runs.values()),
        "ran_twice": sum(count > 1 for count in runs.values()),
        "failed_processes": sum(map(bool, exit_statuses)),
        "run_s": round(seconds, 2),
    }


def measure_store(folder: Path, records: int) -> dict[str, Any]:
    """Measure the commands over one record and copies of its files for all other cells."""
    path, grid = build_grid(folder, records)
    outputs = folder / "outputs"
    store = Store(outputs)
    finish_references(grid, store)
    first_record = store.get_record(grid.cells[0])
    first_record.write_spec(grid.cells[0].training)
    write_record(first_record, grid.cells[0])
    for cell in grid.cells[1:]:
        shutil.copytree(first_record.folder, store.get_record(cell).folder, copy_function=copy_record_file)
    time.sleep(2.5)  # the index caches no file that was written just now
    plain_seconds = min(measure_plain_loop(grid, store) for _ in range(3))
    figures: dict[str, Any] = {"records": records, "plain_s": round(plain_seconds, 2)}
    for command, words in COMMANDS.items():
        shutil.rmtree(outputs / ".cache", ignore_errors=True)
        drop_page_cache(grid, store)
        figures[f"{command}_cold"], _ = run_command([*words, str(path)], outputs)
        warm_times = [run_command([*words, str(path)], outputs)[0] for _ in range(3)]
        figures[f"{command}_warm"] = min(warm_times, key=lambda seconds: seconds["wall_s"])
    return figures


def copy_record_file(source: str, target: str) -> None:
    """Copy a file that a listing reads; link any other, which saves time and space."""
    (shutil.copyfile if Path(source).name in LISTED_FILES else os.link)(source, target)


def measure_plain_loop(grid: Grid, store: Store) -> float:
    """Return the seconds to open and parse the two statuses and the scores of all cells."""
    start = time.perf_counter()
    for cell in grid.cells:
        folder = f"{store.root}/{cell.folder}"
        evaluation = f"{folder}/evaluations/{cell.evaluations[0].folder}"
        for name in (f"{folder}/status.json", f"{evaluation}/status.json", f"{evaluation}/scores.json"):
            with open(name, "rb") as file:
                json.loads(file.read())
    return time.perf_counter() - start


def drop_page_cache(grid: Grid, store: Store) -> None:
    """Drop the files that a listing reads from the page cache, as far as a user may."""
    os.sync()
    for cell in grid.cells:
        evaluation = f"evaluations/{cell.evaluations[0].folder}"
        for name in (
            "status.json",
            "metrics.jsonl",
            f"{evaluation}/status.json",
            f"{evaluation}/scores.json",
        ):
            with open(f"{store.root}/{cell.folder}/{name}", "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_command(
    words: Sequence[str], outputs: Path, *, stdout: int = subprocess.DEVNULL, **options: Any
) -> tuple[dict[str, float], bytes]:
    """Run a whole command; return its times, and what it printed if `stdout` is a pipe.

    Imports and the writing of files are included; `cpu_s`, of all processes, is comparable on a busy machine.
    """
    command = [sys.executable, "-m", "gkd_lab", *words, "--outputs", str(outputs)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    finished = subprocess.run(command, stdout=stdout, check=True, **options)
    wall_seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(wall_seconds, 2), "cpu_s": round(cpu_seconds, 2)}, finished.stdout


def main() -> None:
    """Run the requested parts, print their figures, and write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="50 cells, 1,000 records")
    parser.add_argument("--smoke", action="store_true", help="25 cells, 100 records")
    parser.add_argument("-o", type=Path, default=None, help="a JSON file for the figures")
    parser.add_argument("--only", choices=("processes", "store"), default=None, help="one of the parts")
    options = parser.parse_args()
    cells, records = (25, 100) if options.smoke else (50, 1000) if options.small else (500, 10_000)
    figures: dict[str, Any] = {}
    parts = {
        "processes": ("many_processes", measure_processes, cells),
        "store": ("large_store", measure_store, records),
    }
    for name, measure, size in parts.values() if options.only is None else [parts[options.only]]:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(Path(folder), size)
        print(json.dumps(figures[name]), flush=True)
    if options.o:
        versions = {package: version(package) for package in ("filelock", "pydantic", "pandas")}
        facts = {"device": platform.machine(), "cpus": os.cpu_count(), "versions": versions}
        load = {"load_average_at_the_end": os.getloadavg()[0]}
        options.o.write_text(json.dumps({**facts, **load, **figures, "targets": TARGETS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
