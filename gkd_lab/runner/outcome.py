"""Outcome of a run, and which cells can be run, read from its records. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gkd_lab.config.cell import Cell, Role
from gkd_lab.store import Record, Store
from gkd_lab.tables.failure_causes import RETRY_HINT


@dataclass
class RunOutcome:
    """Failures of a run, and how many cells it left to other processes."""

    failures: list[str] = field(default_factory=list)
    """One line per cause, with what it stopped, the error and the file with the traceback."""
    busy_cell_count: int = 0
    """Number of cells that other processes have locked."""


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


def format_artifact_failure(description: str, record: Record) -> str:
    """Return the message `the TEACHER failed: ERROR (see STATUS FILE; --retry-failed tries again)`."""
    error = record.read_status().get("error", "unknown")
    return f"the {description} failed: {error} (see {record.status_file}; {RETRY_HINT})"
