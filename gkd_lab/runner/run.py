"""An experiment from its first artifact to its last evaluation; what is done is not done again."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gkd_lab.config import GridOfCells
from gkd_lab.config.cell import Cell, Reference, references
from gkd_lab.config.packs import AUTO, packs
from gkd_lab.runner import artifacts
from gkd_lab.runner.cell_locks import Claimed
from gkd_lab.runner.evaluate_cells import evaluate_cells, evaluate_reference
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.train_cells import train
from gkd_lab.store import Part, Record

LOOK_AGAIN = 1.0
"""Seconds between two looks at cells that other processes work on."""


@dataclass
class Outcome:
    """What a run left behind."""

    failed: list[str] = field(default_factory=list)
    """A line for each failure: what, why, where the log is."""
    elsewhere: int = 0
    """Cells that another process is working on."""


def run(grid: GridOfCells, options: RunOptions) -> Outcome:
    """Train and evaluate every cell of the grid and its reference models.

    Cells that other processes hold are passed over and come last, when they are waited for or left.
    """
    outcome = Outcome()
    broken = _references(grid, options, outcome)
    tried, elsewhere = [], []
    for group in groups(grid.cells, options):
        training = group[0].training
        needed = (model.full_fingerprint for _, model in training.models)
        why = next((broken[model] for model in needed if model in broken), None)
        if why is not None:
            _leave_out(group, "failed", why, options)
            continue
        tried += group
        if left := _claim_and_work(group, options):
            elsewhere.append(left)
    if options.held == "wait":
        _come_back(elsewhere, options)
    else:
        outcome.elsewhere = sum(map(len, elsewhere))
        for group in elsewhere:
            _leave_out(group, "elsewhere", "another process works on it", options)
    for cell in tried:
        outcome.failed += _failures(options.store.of(cell), [cell], options)
    return outcome


def groups(cells: Sequence[Cell], options: RunOptions) -> list[list[Cell]]:
    """The packs of a run; several workers of one run get smaller ones where there would be too few."""
    if options.workers == 1 or options.pack != "auto":
        return packs(cells, options.pack)
    return packs(cells, min(AUTO, max(1, math.ceil(len(cells) / options.workers))))


def _claim_and_work(group: Sequence[Cell], options: RunOptions) -> list[Cell]:
    """Work on those cells that nobody holds; returns the others."""
    with Claimed(group, options) as claimed:
        _work(claimed.cells, options)
        return claimed.elsewhere


def _come_back(elsewhere: list[list[Cell]], options: RunOptions) -> None:
    """Wait until others have finished these cells, and take over what one of them leaves undone."""
    # What another has just tried in vain is not tried once more.
    options = replace(options, retry_failed=False)
    waiting, said = elsewhere, False
    while waiting := [left for group in waiting if (left := _claim_and_work(group, options))]:
        if not said:
            options.reporter.say(_awaited([cell for group in waiting for cell in group]))
        said = True
        time.sleep(LOOK_AGAIN)


def _awaited(cells: Sequence[Cell]) -> str:
    if len(cells) == 1:
        return f"waiting for another process that works on the cell {cells[0].fingerprint}"
    return f"waiting for other processes that work on {len(cells)} cells"


def _work(cells: Sequence[Cell], options: RunOptions) -> None:
    """Train and judge the cells of a claimed pack."""
    with options.tracker.open():
        if cells:
            train(cells, options)
            evaluate_cells(cells, options)
        if options.tracker.follows_done:
            for cell in cells:
                options.tracker.start(cell, options.store.of(cell))


def _leave_out(cells: Sequence[Cell], status: str, why: str, options: RunOptions) -> None:
    """Tell a sweep agent's run why its cell was not run here."""
    if options.tracker.follows_done:
        with options.tracker.open():
            for cell in cells:
                options.tracker.left_out(cell, options.store.of(cell), status, why)


def _references(grid: GridOfCells, options: RunOptions, outcome: Outcome) -> dict[str, str]:
    """Build and judge teachers and starts; full fingerprint -> reason for those that could not be built."""
    broken = {}
    for role, model, cells in _free_ones_first(grid, options):
        try:
            record = artifacts.ensure(role, model, grid.scale, options)
        except artifacts.ArtifactFailed as error:
            outcome.failed.append(f"{model.task}: {error}; its {len(cells)} cells were not run")
            broken[model.full_fingerprint] = str(error)
            continue
        evaluate_reference(role, model, record, cells, options)
        outcome.failed += _failures(record, cells, options)
    return broken


def _free_ones_first(grid: GridOfCells, options: RunOptions) -> Iterator[Reference]:
    """The reference models; those that another process works on when their turn comes are left to the end."""
    later = []
    for one in references(grid.cells):
        if options.store.artifact(grid.scale, one.role, one.model).is_claimed():
            later.append(one)
        else:
            yield one
    yield from later


def _failures(record: Record, cells: Sequence[Cell], options: RunOptions) -> list[str]:
    """A line for a failed training and for each failed evaluation of a record."""
    parts: list[Part] = [record]
    parts += [record.evaluation(e) for e in dict.fromkeys(e for c in cells for e in c.evaluations)]
    lines = []
    for part in parts:
        status = part.status()
        if status.get("state") == "failed":
            name = part.folder.relative_to(options.outputs)
            lines.append(
                f"{name}: {status.get('error')} (see {part.status_file}; --retry-failed tries again)"
            )
    return lines
