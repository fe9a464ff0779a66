"""Time the table of 10,000 finished records, against a plain loop over the same files.

    python benchmarks/table.py [CELLS | --smoke]

Prints the best of three runs, all files in the page cache. `read`: all records without the index; `rows` and
the tables use the index, as from the second time on. Garbage collection is paused, as in the command.
"""

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gkd_lab.config import Grid, RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.experiment import parse_experiment
from gkd_lab.store import Store
from gkd_lab.tables.formats import encode_json
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.results import list_models, read_results
from gkd_lab.tables.rows import build_wide_rows
from gkd_lab.tables.table import build_wide_table
from gkd_lab.tasks import TASKS


def build_grid(cells: int) -> Grid:
    """Build an arithmetic grid of `cells` (a multiple of 25): 5 lmbdas, 5 betas, seeds."""
    quarters, betas = [0, 0.25, 0.5, 0.75, 1], [0, 0.1, 0.5, 0.9, 1]
    axes = {"seed": list(range(cells // 25)), "lmbda": quarters, "beta": betas}
    document = {"description": "speed of the table", "task": "arithmetic", "grid": axes}
    revisions = RevisionLookup(
        resolve_data=lambda task, settings: DataSpec(kind="made", name=task, revision="1"),
        resolve_model=lambda name: (name, None, "1"),
    )
    return expand_grid("table", parse_experiment(document, "table"), TASKS, revisions)


def write_records(grid: Grid, store: Store) -> None:
    """Write one record, then copy its files for all other cells."""
    first = grid.cells[0]
    record, evaluation = store.get_record(first), first.evaluations[0]
    score = {"value": 71.2, "low": 67.0, "high": 75.4, "n": 500, "signature": "accuracy|rule:gsm8k"}
    extras = {"mean_length": {"value": 31.5}, "truncated": {"value": 0.01}}
    scores = {**dict.fromkeys(evaluation.metrics, score), **extras}
    record.get_evaluation(evaluation).write_results(evaluation, [], scores, seconds=1.0)
    record.finish(seconds=10.0)
    for cell in grid.cells[1:]:
        shutil.copytree(record.folder, store.get_record(cell).folder, copy_function=shutil.copyfile)


def read_files(grid: Grid, store: Store) -> None:
    """Open and parse the files that the table needs, and nothing else."""
    for cell in grid.cells:
        folder = f"{store.root}/{cell.folder}"
        evaluation = f"{folder}/evaluations/{cell.evaluations[0].folder}"
        for name in (folder, evaluation):
            _read_json(f"{name}/status.json")
        _read_json(f"{evaluation}/scores.json")


def read_without_index(grid: Grid, store: Store) -> None:
    """Read the results of all models from their records."""
    shutil.rmtree(store.root / ".cache", ignore_errors=True)
    read_results(list_models(grid, store), store)


def _read_json(path: str) -> Any:
    """Read a JSON file."""
    with open(path, "rb") as file:
        return json.loads(file.read())


def time_fastest(runs: int, work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of `runs`."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Build the records, time both ways, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", type=int, nargs="?", default=10_000, help="a multiple of 25")
    parser.add_argument("--smoke", action="store_true", help="100 cells")
    options = parser.parse_args()
    count = 100 if options.smoke else options.cells
    gc.disable()
    with tempfile.TemporaryDirectory() as folder:
        grid, store = build_grid(count), Store(Path(folder))
        write_records(grid, store)
        time.sleep(2.5)  # the index caches no file that was written just now
        assert build_wide_table(grid, store)["status"].value_counts()["done"] == len(grid.cells)
        plain = time_fastest(3, partial(read_files, grid, store))
        rows = build_wide_rows(grid, store)
        works: dict[str, Callable[[], object]] = {
            "read": lambda: read_without_index(grid, store),
            "rows": lambda: build_wide_rows(grid, store),
            "rows as JSON": lambda: encode_json(rows),
            "wide table": lambda: build_wide_table(grid, store),
            "long table": lambda: build_long_table(grid, store),
        }
        for name, work in works.items():
            seconds = time_fastest(3, work)
            print(
                f"{name}: {seconds:.2f} s for {len(grid.cells)} records, "
                f"{seconds / len(grid.cells) * 1e6:.0f} us a record, "
                f"{seconds / plain:.2f} x a plain loop over the same files ({plain:.2f} s)"
            )


if __name__ == "__main__":
    main()
