"""Time the expansion of 10,000 cells and their fingerprints, against json.dumps and SHA-256 of the same.

    python benchmarks/expand.py [CELLS | --smoke]

Two grids: the cells of the first (lmbda, beta, seed) share most of the work of resolving them, those of the
second (steps) are resolved one by one. Prints the best of three runs.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gkd_lab.config import Grid, RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.experiment import parse_experiment
from gkd_lab.tasks import TASKS

REVISIONS = RevisionLookup(
    resolve_data=lambda task, settings: DataSpec(kind="made", name=task, revision="1"),
    resolve_model=lambda name: (name, None, "1"),
)


def build_axes(cells: int) -> dict[str, dict[str, list[float]]]:
    """Return the axes of two grids of `cells` cells (a multiple of 25)."""
    quarters, betas = [0, 0.25, 0.5, 0.75, 1], [0, 0.1, 0.5, 0.9, 1]
    return {
        "lmbda x beta x seed": {"lmbda": quarters, "beta": betas, "seed": [*range(cells // 25)]},
        "steps": {"steps": [*range(1, cells + 1)]},
    }


def expand_axes(axes: dict[str, list[float]]) -> Grid:
    """Expand a grid; fingerprints are computed on the way, to find the cells that collapse."""
    document = {"description": "speed", "task": "arithmetic", "grid": axes}
    return expand_grid("speed", parse_experiment(document, "speed"), TASKS, REVISIONS)


def hash_cells(cells: list[dict[str, Any]]) -> list[str]:
    """Hash the sorted JSON of each cell: the least that a fingerprint can cost."""
    return [hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest() for cell in cells]


def time_fastest(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Expand both grids, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", type=int, nargs="?", default=10_000, help="a multiple of 25")
    parser.add_argument("--smoke", action="store_true", help="100 cells")
    options = parser.parse_args()
    for name, axes in build_axes(100 if options.smoke else options.cells).items():
        cells = [cell.training.model_dump(mode="json") for cell in expand_axes(axes).cells]
        ours = time_fastest(partial(expand_axes, axes))
        baseline = time_fastest(partial(hash_cells, cells))
        print(
            f"{len(cells)} cells over {name}: {ours:.2f} s, {ours / baseline:.1f} times "
            f"the {baseline:.2f} s of json.dumps + SHA-256"
        )


if __name__ == "__main__":
    main()
