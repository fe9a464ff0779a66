"""Failures of a grid: each cause once, with the models, cells and evaluations that it stopped."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gkd_lab.config import Cell, Grid
from gkd_lab.config.cell import list_references
from gkd_lab.store import Record, Store
from gkd_lab.store.cell_state import get_error_line
from gkd_lab.tables.training_facts import name_reference

FailedPart = Literal["model", "cell", "evaluation"]
RETRY_HINT = "--retry-failed tries again"
_MAX_NAMES = 3
"""Names that a line of several parts gives."""


@dataclass(frozen=True)
class Failure:
    """A part of a grid that failed: a reference model, a cell's training, or an evaluation."""

    part: FailedPart
    name: str
    """`teacher TASK/NAME`, or the part's folder below the outputs."""
    reason: str
    file: Path
    """`status.json` with the traceback."""
    stopped: frozenset[str] = frozenset()
    """Fingerprints of the cells that were not run without it."""


def list_failures(grid: Grid, store: Store) -> list[Failure]:
    """Return what failed of a grid: reference models and their evaluations, a teacher's output, then cells.

    Cells of which a reference model has failed were not run; what an earlier run stored of them is left out.
    """
    failures: list[Failure] = []
    for role, model, cells in list_references(grid.cells):
        record = store.get_artifact(grid.scale, role, model)
        name = f"{role} {name_reference(model)}"
        failures += list_record_failures(record, cells, store, "model", name, _get_fingerprints(cells))
    stopped = frozenset().union(*(failure.stopped for failure in failures))
    runnable_cells = [cell for cell in grid.cells if cell.full_fingerprint not in stopped]
    failures += _list_output_failures(runnable_cells, store)
    for cell in runnable_cells:
        failures += list_record_failures(store.get_record(cell), [cell], store, "cell", cell.folder)
    return failures


def _get_fingerprints(cells: Iterable[Cell]) -> frozenset[str]:
    """Return the full fingerprints of some cells."""
    return frozenset(cell.full_fingerprint for cell in cells)


def _list_output_failures(cells: Iterable[Cell], store: Store) -> Iterator[Failure]:
    """Yield the failed texts and scores of teachers whose cells have no status; else the cells tell."""
    waiting: dict[Record, tuple[str, list[Cell]]] = {}
    for cell in cells:
        text, scores = cell.training.text_spec, cell.training.scores_spec
        if (text is None and scores is None) or store.get_record(cell).read_status():
            continue
        if text is not None:
            record = store.get_teacher_text(cell.scale, text)
            waiting.setdefault(record, ("teacher's text", []))[1].append(cell)
        if scores is not None:
            record = store.get_teacher_scores(cell.scale, scores)
            waiting.setdefault(record, ("teacher's scores", []))[1].append(cell)
    for record, (description, stopped_cells) in waiting.items():
        name = f"{description} for {stopped_cells[0].task}"
        yield from list_record_failures(record, [], store, "model", name, _get_fingerprints(stopped_cells))


def list_record_failures(
    record: Record,
    cells: Sequence[Cell],
    store: Store,
    part: FailedPart,
    name: str,
    stopped: frozenset[str] = frozenset(),
) -> Iterator[Failure]:
    """Yield the failure of a record's training, and of its evaluations by these cells."""
    reason = get_error_line(record.read_status())
    if reason is not None:
        yield Failure(part, name, reason, record.status_file, stopped)
    for evaluation in dict.fromkeys(evaluation for cell in cells for evaluation in cell.evaluations):
        evaluated = record.get_evaluation(evaluation)
        reason = get_error_line(evaluated.read_status())
        if reason is not None:
            folder = str(evaluated.folder.relative_to(store.root))
            yield Failure("evaluation", folder, reason, evaluated.status_file)


def group_failures(failures: Iterable[Failure]) -> list[list[Failure]]:
    """Return the failures of each cause together, in the order of their first.

    One cause is one reason; the step at which it struck may be another one in each cell.
    """
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        groups.setdefault(re.sub(r"\bstep \d+", "step", failure.reason), []).append(failure)
    return list(groups.values())


def format_failures(failures: Iterable[Failure]) -> list[str]:
    """Return one line for each cause: what it stopped, the reason, and the file with the traceback."""
    return [_format_group(group) for group in group_failures(failures)]


def _format_group(group: Sequence[Failure]) -> str:
    """Return `NAMES: REASON (see FILE; --retry-failed tries again)`, of many parts their number first."""
    first = group[0]
    others = [failure.name for failure in group if failure.part != "model"]
    names = f": {join_names(others)}" if len(others) > 1 else ""
    stopped = len(frozenset().union(*(failure.stopped for failure in group)))
    waiting = f"; {'1 cell was' if stopped == 1 else f'{stopped} cells were'} not run" if stopped else ""
    file = f"see {first.file}; {RETRY_HINT}"
    return f"{name_group(group)}: {first.reason}{names}{waiting} ({file})"


def name_group(group: Sequence[Failure]) -> str:
    """Return the names of failed models and, of cells and evaluations, the one name or their number."""
    names = [failure.name for failure in group if failure.part == "model"]
    others: list[FailedPart] = ["cell", "evaluation"]
    for part in others:
        parts = [failure.name for failure in group if failure.part == part]
        if parts:
            names.append(parts[0] if len(group) == 1 else f"{len(parts)} {part}{'s' * (len(parts) > 1)}")
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def join_names(names: Sequence[str]) -> str:
    """Return the first names and how many more there are."""
    hidden = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {hidden} more" if hidden > 0 else "")
