"""Seconds for 10,000 cells and their fingerprints, against json.dumps and SHA-256 of the same cells.

    python benchmarks/expand.py [CELLS]

Two grids: one over axes that every cell reads for itself (lmbda, beta, seed), and one over an axis
that makes each cell be resolved by itself (steps). Prints the best of three runs.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from gkd_lab.config import Grid, RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.experiment import parse_experiment
from gkd_lab.tasks import TASKS

REVISIONS = RevisionLookup(
    resolve_data=lambda task, settings: DataSpec(kind="made", name=task, revision="1"),
    resolve_model=lambda name: (name, None, "1"),
)


def grids(cells: int) -> dict[str, dict[str, list[float]]]:
    """Two ways to ask for `cells` cells (a multiple of 25)."""
    quarters, betas = [0, 0.25, 0.5, 0.75, 1], [0, 0.1, 0.5, 0.9, 1]
    return {
        "lmbda x beta x seed": {"lmbda": quarters, "beta": betas, "seed": [*range(cells // 25)]},
        "steps": {"steps": [*range(1, cells + 1)]},
    }


def expanded(grid: dict[str, list[float]]) -> Grid:
    """All cells of a grid; fingerprints are taken on the way, to find the cells that collapse."""
    document = {"description": "speed", "task": "arithmetic", "grid": grid}
    return expand_grid("speed", parse_experiment(document, "speed"), TASKS, REVISIONS)


def plain(cells: list[dict[str, Any]]) -> list[str]:
    """The least that an identity can cost: sorted JSON of each cell, hashed."""
    return [hashlib.sha256(json.dumps(c, sort_keys=True).encode()).hexdigest() for c in cells]


def best(work: Callable[[], object]) -> float:
    """The fastest of three runs, in seconds."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    for name, grid in grids(count).items():
        cells = [cell.training.model_dump(mode="json") for cell in expanded(grid).cells]
        ours, least = best(lambda grid=grid: expanded(grid)), best(lambda cells=cells: plain(cells))
        print(
            f"{len(cells)} cells over {name}: {ours:.2f} s, {ours / least:.1f} times "
            f"the {least:.2f} s of json.dumps + SHA-256"
        )


if __name__ == "__main__":
    main()
