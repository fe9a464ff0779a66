"""Time the commands that read: a report over many grid points, listings of many records, running cells.

    python benchmarks/reading.py [--smoke] [--old CHECKOUT] [--only PART] [-o FILE.json]

Whole commands, imports included, the fastest of several; `cpu_s` is comparable on a busy machine too.

report    1,000 grid points (lmbda x beta x learning rate, one seed), and the first half and quarter of them
listing   `status` and `table` in all forms over 10,000 finished records, warm
running   `status` while 15 cells with histories of 100,000 rows run: this process holds their locks

`--old`: a checkout of an earlier version, whose commands run alternately with these on the same records; then
`same` says whether both print the same bytes.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load
import yaml

from gkd_lab import experiments
from gkd_lab.config import Cell, Grid
from gkd_lab.config.cell import list_references
from gkd_lab.store import Record, Store
from gkd_lab.store.files import write_json_lines
from gkd_lab.store.timing import TIMES_FILE

TARGETS = {"report_1000_s": 10.0, "status_warm_s": 2.0, "table_warm_s": 2.0}
LMBDAS, BETAS = [0, 0.25, 0.5, 0.75, 1], [0, 0.1, 0.5, 0.9, 1]
LISTINGS = {
    "status": ["status"],
    "table": ["table"],
    "table_json": ["table", "--format", "json"],
    "table_csv": ["table", "--format", "csv"],
    "long_table_csv": ["table", "--format", "csv", "--long"],
}
Checkouts = dict[str, Path]
"""`now` and perhaps `old` -> the folder that holds the package."""


def build_grid(folder: Path, name: str, axes: dict[str, Any]) -> tuple[Path, Grid]:
    """Return the file and the grid of an arithmetic experiment over these axes."""
    document = {"description": "reading", "task": "arithmetic", "grid": axes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path, experiments.load(str(path), outputs=folder / "outputs")


def write_scores(record: Record, cell: Cell, accuracy: float) -> None:
    """Write an evaluation of 200 examples without its predictions."""
    names = cell.evaluations[0].metrics
    interval = {"low": accuracy - 4.0, "high": accuracy + 4.0, "n": 200, "signature": "made"}
    scores = {name: {"value": accuracy, **interval} for name in names}
    record.get_evaluation(cell.evaluations[0]).write_results(cell.evaluations[0], [], scores, rows=0)


def write_finished_cell(record: Record, cell: Cell, accuracy: float) -> None:
    """Write the record of a finished cell with a short history, without its checkpoint."""
    record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    record.rewind_history(0)
    for step in (200, 400):
        record.log_row({"step": step, "loss": 1 / step, "on_policy": cell.lmbda, "completion_length": 9.0})
    record.write_provenance({"python": platform.python_version()})
    record.finish(steps=400, tokens=3600, shared_by=1, device="cpu", seconds=10.0)
    write_scores(record, cell, accuracy)


def write_references(grid: Grid, store: Store) -> None:
    """Write finished records of the SFT student, with 20 points, and of the teacher, with 95."""
    for role, model, cells in list_references(grid.cells):
        record = store.get_artifact(grid.scale, role, model)
        record.write_spec(model, role=role)
        record.finish(parameters=1000)
        write_scores(record, cells[0], 20.0 if role == "start" else 95.0)


def write_store(grid: Grid, store: Store) -> None:
    """Write the reference models and one finished cell; copy its files for all other cells."""
    write_references(grid, store)
    first = store.get_record(grid.cells[0])
    write_finished_cell(first, grid.cells[0], 70.0)
    for cell in grid.cells[1:]:
        shutil.copytree(first.folder, store.get_record(cell).folder, copy_function=load.copy_record_file)


def change_accuracy(folder: Path, cell: Cell, accuracy: float) -> None:
    """Change the scores of a copied record; not by the store's own functions, which wait for the disk."""
    evaluation = Store(folder / "outputs").get_record(cell).get_evaluation(cell.evaluations[0])
    path = evaluation.folder / "scores.json"
    path.write_text(path.read_text().replace("70.0", str(accuracy)))


def measure_commands(
    words: Sequence[str], folder: Path, checkouts: Checkouts, count: int, output: Path | None = None
) -> dict[str, Any]:
    """Return the fastest times of one command by each checkout, and whether all print the same."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    contents = set()
    for _ in range(count):
        for name, checkout in checkouts.items():
            seconds, printed = run_checkout(words, folder, checkout)
            times[name].append(seconds)
            contents.add(printed if output is None else output.read_bytes())
    fastest = {
        name: {key: min(run[key] for run in runs) for key in ("wall_s", "cpu_s")}
        for name, runs in times.items()
    }
    return {**fastest, **({"same": len(contents) == 1} if len(checkouts) > 1 else {})}


def run_checkout(words: Sequence[str], folder: Path, checkout: Path) -> tuple[dict[str, float], bytes]:
    """Run a command of a checkout; return its times and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return load.run_command(words, folder / "outputs", stdout=subprocess.PIPE, cwd=folder, env=environment)


def measure_report(folder: Path, is_smoke: bool, checkouts: Checkouts) -> dict[str, Any]:
    """Measure the report of a grid, and of its first parts, which are grids of their own."""
    figures: dict[str, Any] = {}
    for count in (50, 25) if is_smoke else (1000, 500, 250):
        rates = [round(1e-4 + number * 1e-7, 9) for number in range(count // 25)]
        axes = {"lmbda": LMBDAS, "beta": BETAS, "learning_rate": rates}
        path, grid = build_grid(folder, f"report{count}", axes)
        if not figures:
            write_store(grid, Store(folder / "outputs"))
            for number, cell in enumerate(grid.cells):
                change_accuracy(folder, cell, 30 + 50 * cell.lmbda + number * 37 % 101 / 10)
        page = folder / f"report{count}.html"
        figures[str(count)] = measure_commands(
            ["report", str(path), "-o", str(page)], folder, checkouts, 1, page
        )
    return figures


def measure_listing(folder: Path, is_smoke: bool, checkouts: Checkouts) -> dict[str, Any]:
    """Measure the listings over one record and copies of its files for all other cells."""
    records = 100 if is_smoke else 10_000
    axes = {"lmbda": LMBDAS, "beta": BETAS, "seed": [*range(records // 25)]}
    path, grid = build_grid(folder, "listing", axes)
    write_store(grid, Store(folder / "outputs"))
    time.sleep(2.5)  # the index caches no file that was written just now
    figures: dict[str, Any] = {}
    for name, words in LISTINGS.items():
        # Not in turn: each version would replace the other's index. The first of its runs makes its own.
        parts = [
            measure_commands([*words, str(path)], folder, {key: checkout}, 1 if is_smoke else 3)
            for key, checkout in checkouts.items()
        ]
        printed = {run_checkout([*words, str(path)], folder, checkout)[1] for checkout in checkouts.values()}
        figures[name] = {key: times for part in parts for key, times in part.items()}
        figures[name] |= {"same": len(printed) == 1} if len(checkouts) > 1 else {}
    return figures


def measure_running(folder: Path, is_smoke: bool, checkouts: Checkouts) -> dict[str, Any]:
    """Measure `status` of a grid of 15 cells that all run, each with a long history."""
    rows = 1000 if is_smoke else 100_000
    path, grid = build_grid(folder, "running", {"lmbda": [0, 0.5, 1], "beta": BETAS})
    store = Store(folder / "outputs")
    with ExitStack() as locks:
        for cell in grid.cells:
            record = store.get_record(cell)
            locks.enter_context(record.lock())
            record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
            write_json_lines(record.metrics_file, iterate_history(rows))
            times = ({"step": step, "time": 1.7e9 + step / 4} for step in range(1, rows + 1))
            write_json_lines(record.folder / TIMES_FILE, times)
        return {"15": measure_commands(["status", str(path)], folder, checkouts, 1 if is_smoke else 3)}


def iterate_history(rows: int) -> Iterator[dict[str, Any]]:
    """Yield rows as a training logs them, one a step."""
    for step in range(1, rows + 1):
        measures = {"loss": 1 / step, "grad_norm": 0.5 + step % 7, "learning_rate": 3e-4, "entropy": 1.25}
        yield {"step": step, **measures, "on_policy": 0.5, "completion_length": 9.0}


PARTS = {"report": measure_report, "listing": measure_listing, "running": measure_running}


def main() -> None:
    """Run the requested parts, print their figures, and write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="50 grid points, 100 records, 1,000 rows")
    parser.add_argument("--old", type=Path, default=None, help="a checkout of an earlier version")
    parser.add_argument("--only", choices=tuple(PARTS), default=None, help="one of the parts")
    parser.add_argument("-o", type=Path, default=None, help="a JSON file for the figures")
    options = parser.parse_args()
    checkouts = {"now": Path(__file__).resolve().parents[1]}
    if options.old is not None:
        checkouts["old"] = options.old.resolve()
    figures: dict[str, Any] = {}
    for name in [options.only] if options.only else PARTS:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = PARTS[name](Path(folder), options.smoke, checkouts)
        print(json.dumps({name: figures[name]}), flush=True)
    if options.o:
        versions = {package: version(package) for package in ("matplotlib", "pandas", "pydantic")}
        facts = {"device": platform.machine(), "cpus": os.cpu_count(), "versions": versions}
        busy = {"load_average_at_the_end": round(os.getloadavg()[0], 1)}
        options.o.write_text(json.dumps({**facts, **busy, **figures, "targets": TARGETS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
