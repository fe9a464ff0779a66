"""What the cells of a grid start from and train on: scores of reference models, passes over the rows.

A start that has not learned its rows, or that scores unlike the one behind the committed tables, makes
results that another machine may not repeat: a warning says so.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from gkd_lab.config import Cell, Grid, SftModel
from gkd_lab.config.cell import Reference, list_references
from gkd_lab.config.packs import drop_model_seeds
from gkd_lab.store import Store
from gkd_lab.tables.rows import get_primary_metric

LEARNED_SCORE = 90.0
"""Score, of 100, on its own training rows from which a start counts as having learned them."""
ALLOWED_DISTANCE = 3.0
"""Points by which a start may lie outside of what the seeds of the committed ones span."""
MAX_LISTED_EPOCHS = 5
"""Numbers of passes over the data that are listed for a task."""
COMMITTED_STARTS = "committed_starts.json"
"""File beside this module: SFT student without seeds -> range of its committed scores."""


@dataclass(frozen=True)
class ReferenceScores:
    """Scores of a teacher or an SFT student, None where there is none yet."""

    metric: str
    test: float | None
    """By the first evaluation and metric of its cells."""
    train: float | None
    """On the first rows of its own fine-tuning, by the task's first metric."""
    train_rows: int

    def __str__(self) -> str:
        """Format `accuracy 18.4, on 200 of its training rows 100.0`; empty without a score."""
        texts = [] if self.test is None else [f"{self.metric} {self.test:.1f}"]
        if self.train is not None:
            texts.append(f"on {self.train_rows} of its training rows {self.train:.1f}")
        return ", ".join(texts)


def read_reference_scores(grid: Grid, store: Store, reference: Reference) -> ReferenceScores:
    """Read the stored scores of a teacher or an SFT student."""
    record = store.get_artifact(grid.scale, reference.role, reference.model)
    evaluation, metric = get_primary_metric(reference.cells[0])
    score = record.get_evaluation(evaluation).read_scores().get(metric, {})
    train = record.read_status().get("train_score", {})
    return ReferenceScores(metric, score.get("value"), train.get("value"), train.get("rows", 0))


def describe_references(grid: Grid, store: Store) -> list[str]:
    """Return `role name: scores` of each teacher and SFT student that has a score."""
    scores = [
        (reference, str(read_reference_scores(grid, store, reference)))
        for reference in list_references(grid.cells)
    ]
    return [f"{item.role} {name_reference(item.model)}: {text}" for item, text in scores if text]


def list_start_warnings(grid: Grid, store: Store) -> list[str]:
    """Return a sentence for each SFT student that is no good base for a comparison."""
    return [
        f"warning: the start {name_reference(reference.model)} {problem}"
        for reference in list_references(grid.cells)
        if reference.role == "start"
        for problem in _list_problems(reference, read_reference_scores(grid, store, reference))
    ]


def _list_problems(reference: Reference, scores: ReferenceScores) -> Iterator[str]:
    """Yield what is wrong with an SFT student: rows not learned, a score unlike the committed ones."""
    if scores.train is not None and scores.train < LEARNED_SCORE:
        yield (
            f"has not learned its training rows ({scores.train:.1f} on {scores.train_rows} of them): stopped "
            "on the way, its score depends on machine and seed; train it longer, unless its size is the limit"
        )
    committed = _load_committed_starts().get(get_start_key(reference))
    if committed is None or scores.test is None or committed["metric"] != scores.metric:
        return
    low, high = committed["low"] - ALLOWED_DISTANCE, committed["high"] + ALLOWED_DISTANCE
    if not low <= scores.test <= high:
        yield (
            f"has {scores.metric} {scores.test:.1f}; the {committed['seeds']} behind the committed table "
            f"{committed['table']} have {committed['low']:.1f} to {committed['high']:.1f}, so its numbers do "
            "not hold here"
        )


def get_start_key(reference: Reference) -> str:
    """Return what SFT students of all seeds have in common: a fingerprint without their seeds."""
    return drop_model_seeds(reference.model).fingerprint


@cache
def _load_committed_starts() -> dict[str, dict[str, Any]]:
    """Return the contents of `committed_starts.json`; cached."""
    stored: dict[str, dict[str, Any]] = json.loads(
        files("gkd_lab.tables").joinpath(COMMITTED_STARTS).read_text()
    )
    return stored


def name_reference(model: SftModel) -> str:
    """Return `arithmetic/small`, or with rows and seed if stated: `arithmetic/small, 250 rows, seed 1`."""
    rows = None if model.sft is None else model.sft.rows
    seed = model.model.init_seed or (0 if model.sft is None else model.sft.seed)
    details = [f"{rows:,} rows"] if rows else []
    details += [f"seed {seed}"] if seed else []
    return ", ".join((f"{model.task}/{model.model.name}", *details))


def describe_epochs(grid: Grid) -> list[str]:
    """Return a note for each task whose number of rows is known: how often training passes over them."""
    notes = []
    for cells in group_cells_by_task(grid):
        passes = [item for item in dict.fromkeys(map(_count_epochs, cells)) if item is not None]
        texts = [f"{epochs:.3g} times over {rows:,} rows" for epochs, rows in passes[:MAX_LISTED_EPOCHS]]
        others = len(passes) - len(texts)
        if texts:
            more = f" and {others} more" if others else ""
            notes.append(f"{cells[0].task}: distillation passes {', '.join(texts)}{more}")
    return notes


def _count_epochs(cell: Cell) -> tuple[float, int] | None:
    """Return (passes of the distillation over its rows, their number); None if the number is not known."""
    training = cell.training
    rows = training.num_rows
    return None if rows is None else (training.steps * training.batch_size / rows, rows)


def group_cells_by_task(grid: Grid) -> list[list[Cell]]:
    """Return a list of cells for each task, in the grid's order."""
    groups: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        groups.setdefault(cell.task, []).append(cell)
    return list(groups.values())
