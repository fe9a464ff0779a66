"""An experiment from its first artifact to its last evaluation; what is done is not done again."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gkd_lab.records import Part, Record
from gkd_lab.runs import artifacts
from gkd_lab.runs.cells import train
from gkd_lab.runs.claims import Claimed
from gkd_lab.runs.judging import evaluate_cells, evaluate_reference
from gkd_lab.runs.options import RunOptions
from gkd_lab.spec import GridOfCells
from gkd_lab.spec.cell import Cell, references
from gkd_lab.spec.packs import packs


@dataclass
class Outcome:
    """What a run left behind."""

    failed: list[str] = field(default_factory=list)
    """A line for each failure: what, why, where the log is."""
    elsewhere: int = 0
    """Cells that another process is working on."""


def run(grid: GridOfCells, options: RunOptions) -> Outcome:
    """Train and evaluate every cell of the grid and its reference models."""
    outcome = Outcome()
    broken = _references(grid, options, outcome)
    for group in packs(grid.cells, options.pack):
        training = group[0].training
        needed = (training.teacher.full_fingerprint, training.start.full_fingerprint)
        why = next((broken[model] for model in needed if model in broken), None)
        if why is not None:
            _leave_out(group, "failed", why, options)
            continue
        with Claimed(group, options) as claimed:
            outcome.elsewhere += len(claimed.elsewhere)
            _leave_out(claimed.elsewhere, "elsewhere", "another process works on it", options)
            _work(claimed.cells, options)
        for cell in group:
            outcome.failed += _failures(options.store.of(cell), [cell], options)
    return outcome


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
    for role, model, cells in references(grid.cells):
        try:
            record = artifacts.ensure(role, model, grid.scale, options)
        except artifacts.ArtifactFailed as error:
            outcome.failed.append(f"{model.task}: {error}; its {len(cells)} cells were not run")
            broken[model.full_fingerprint] = str(error)
            continue
        evaluate_reference(role, model, record, cells, options)
        outcome.failed += _failures(record, cells, options)
    return broken


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
