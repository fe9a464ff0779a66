"""State of a unit, read from the records that it makes; no file of the unit itself decides it."""

from collections.abc import Sequence
from pathlib import Path

from gkd_lab.config.artifact_specs import SftModel, TeacherScoresSpec, TeacherTextSpec
from gkd_lab.config.cell import Cell
from gkd_lab.config.units import Unit
from gkd_lab.store.cell_state import State, StoredState, combine_states, compute_cell_state, require_metrics
from gkd_lab.store.record import Record, Store


def get_unit_records(unit: Unit, store: Store) -> list[Record]:
    """Return the records that a unit makes: one of an artifact, one per cell of a pack."""
    if isinstance(unit.spec, SftModel):
        return [store.get_artifact(unit.scale, unit.kind, unit.spec)]
    if isinstance(unit.spec, TeacherTextSpec):
        return [store.get_teacher_text(unit.scale, unit.spec)]
    if isinstance(unit.spec, TeacherScoresSpec):
        return [store.get_teacher_scores(unit.scale, unit.spec)]
    return [store.get_record(cell) for cell in unit.cells]


def read_unit_state(unit: Unit, store: Store) -> State:
    """Return the worst state of what a unit makes; a reference model counts with its evaluations."""
    records = get_unit_records(unit, store)
    if unit.kind == "pack":
        pairs = zip(unit.cells, records, strict=True)
        return combine_states([_read_state(record, [cell]) for cell, record in pairs])
    is_evaluated = isinstance(unit.spec, SftModel)
    return _read_state(records[0], unit.cells if is_evaluated else [])


def read_output_state(unit: Unit, store: Store) -> State:
    """Return the state of what dependent units read of an artifact's unit: its record alone."""
    return get_unit_records(unit, store)[0].read_state()


def is_unit_settled(unit: Unit, store: Store) -> bool:
    """Return whether nothing of a unit is left to do: each part is done, failed, or of a failed training."""
    is_evaluated = unit.kind == "pack" or isinstance(unit.spec, SftModel)
    cells_of_records = [[cell] for cell in unit.cells] if unit.kind == "pack" else [unit.cells]
    for record, cells in zip(get_unit_records(unit, store), cells_of_records, strict=True):
        state = record.read_status().get("state")
        is_trained = state == "done" and is_evaluated
        if state is None or (is_trained and None in _list_evaluation_states(record, cells)):
            return False
    return True


def measure_progress(unit: Unit, store: Store) -> int:
    """Return a count that grows when a unit gets on: finished parts, and the steps of checkpoints."""
    progress = 0
    for record in get_unit_records(unit, store):
        progress += sum(1 for _ in record.folder.glob("evaluations/*/status.json"))
        progress += _find_last_step(record.steps_folder)
        if record.read_status():
            # More than any checkpoint of the training, which is deleted when the record is finished.
            progress += 10**9
    return progress


def _read_state(record: Record, cells: Sequence[Cell]) -> State:
    """Return the worst state of a record and of its evaluations that cells request."""
    states = _list_evaluation_states(record, cells)
    return compute_cell_state(record.read_status().get("state"), states, record.is_locked).whole


def _list_evaluation_states(record: Record, cells: Sequence[Cell]) -> list[StoredState]:
    """Return the stored state of each evaluation that cells request; None: not done, or metrics lack."""
    states: list[StoredState] = []
    for evaluation in dict.fromkeys(evaluation for cell in cells for evaluation in cell.evaluations):
        part = record.get_evaluation(evaluation)
        state = part.read_status().get("state")
        states.append(require_metrics(state, evaluation.metrics, part.read_scores()) if state else None)
    return states


def _find_last_step(steps_folder: Path) -> int:
    """Return the step of the newest checkpoint in a folder; 0 without one."""
    names = (path.name.rpartition("-")[2] for path in steps_folder.glob("checkpoint-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)
