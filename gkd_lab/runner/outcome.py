"""Outcome of a run, read from its records: the same failure lines whichever engine ran the grid. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gkd_lab.config import Grid
from gkd_lab.config.cell import Cell, Role, list_references
from gkd_lab.store import Record, RecordPart, Store

RETRY_HINT = "--retry-failed tries again"


@dataclass
class RunOutcome:
    """Failures of a run, and how many cells it left to other processes."""

    failures: list[str] = field(default_factory=list)
    """One line per failure, with its error and status file."""
    busy_cell_count: int = 0
    """Number of cells that other processes have locked."""


def list_failures(grid: Grid, store: Store) -> list[str]:
    """Return a line per failure in the records of a grid: of reference models, then of cells.

    A failed reference model stands for its cells, which were not run; models that failed for one reason share
    a line.
    """
    lines: list[str] = []
    line_numbers: dict[str, int] = {}
    """Reason of a failed model -> number of its line."""
    for role, model, cells in list_references(grid.cells):
        record = store.get_artifact(grid.scale, role, model)
        status = record.read_status()
        if status.get("state") != "failed":
            lines += list_record_failures(record, cells, store)
            continue
        reason = str(status.get("error"))
        if reason in line_numbers:
            lines[line_numbers[reason]] += (
                f"; the {role} failed for the same reason (see {record.status_file})"
            )
        else:
            line_numbers[reason] = len(lines)
            failure = format_artifact_failure(role, record)
            lines.append(f"{model.task}: {failure}; its {len(cells)} cells were not run")
    runnable_cells = list_runnable_cells(grid.cells, store)
    lines += _iterate_output_failures(runnable_cells, store)
    for cell in runnable_cells:
        lines += list_record_failures(store.get_record(cell), [cell], store)
    return lines


def list_runnable_cells(cells: Sequence[Cell], store: Store) -> list[Cell]:
    """Return the cells none of whose reference models has failed."""
    failed: dict[tuple[Role, str], bool] = {}

    def has_failed_model(cell: Cell) -> bool:
        """Return whether a reference model of the cell has failed; each model's status is read once."""
        for role, model in cell.training.reference_models:
            key = (role, model.full_fingerprint)
            if key not in failed:
                status = store.get_artifact(cell.scale, role, model).read_status()
                failed[key] = status.get("state") == "failed"
            if failed[key]:
                return True
        return False

    return [cell for cell in cells if not has_failed_model(cell)]


def list_record_failures(record: Record, cells: Sequence[Cell], store: Store) -> list[str]:
    """Return a line (folder, error, status file) per failure: of training and of evaluations of `cells`."""
    evaluations = dict.fromkeys(evaluation for cell in cells for evaluation in cell.evaluations)
    parts: list[RecordPart] = [record, *map(record.get_evaluation, evaluations)]
    statuses = [(part, part.read_status()) for part in parts]
    return [
        f"{part.folder.relative_to(store.root)}: {status.get('error')} (see {part.status_file}; {RETRY_HINT})"
        for part, status in statuses
        if status.get("state") == "failed"
    ]


def format_artifact_failure(description: str, record: Record) -> str:
    """Return the message `the TEACHER failed: ERROR (see STATUS FILE; --retry-failed tries again)`."""
    error = record.read_status().get("error", "unknown")
    return f"the {description} failed: {error} (see {record.status_file}; {RETRY_HINT})"


def _iterate_output_failures(cells: Sequence[Cell], store: Store) -> Iterator[str]:
    """Yield a line per failed text or scores of a teacher whose cells were not run; else the cells tell."""
    waiting: dict[tuple[str, Record], int] = {}
    for cell in cells:
        text, scores = cell.training.text_spec, cell.training.scores_spec
        if store.get_record(cell).read_status() or (text is None and scores is None):
            continue
        outputs: list[tuple[str, Record]] = []
        if text is not None:
            outputs.append(("teacher's text", store.get_teacher_text(cell.scale, text)))
        if scores is not None:
            outputs.append(("teacher's scores", store.get_teacher_scores(cell.scale, scores)))
        for description, record in outputs:
            if record.read_status().get("state") == "failed":
                key = (f"{cell.task}: {format_artifact_failure(description, record)}", record)
                waiting[key] = waiting.get(key, 0) + 1
    for (line, _), count in waiting.items():
        yield f"{line}; its {count} cells were not run"
