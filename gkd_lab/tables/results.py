"""Results of the models of a grid, read from their records: states, scores, errors and training times."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gkd_lab.config import Cell, Grid, SftModel
from gkd_lab.config.cell import AnyEvaluation, list_references
from gkd_lab.store import EvaluationRecord, Record, Store
from gkd_lab.store.cell_state import State, compute_cell_state, get_error_line, require_metrics

ModelRole = Literal["cell", "start", "teacher"]
Scores = Mapping[str, Mapping[str, Any]]
"""Metric -> `{"value", "low", "high", "n", ...}`, as `scores.json` stores them."""


@dataclass(frozen=True)
class TableModel:
    """A model of a table: a cell's student, an SFT student (role `start`) or a teacher."""

    role: ModelRole
    fingerprint: str
    record: Record
    cells: Sequence[Cell]
    """The cell itself, or the cells that need the reference model."""
    spec: SftModel | None = None
    """Specification of a reference model."""

    @property
    def evaluations(self) -> tuple[AnyEvaluation, ...]:
        """Evaluations that the experiment asks for."""
        return self.cells[0].evaluations


@dataclass(frozen=True)
class EvaluationResults:
    """State and scores of one evaluation of a model."""

    name: str
    """Its name in columns."""
    evaluation: AnyEvaluation
    state: State
    scores: Scores
    """Stored scores, also of an evaluation that is missing because it lacks a requested metric."""
    is_added: bool
    """Whether `gkd-lab evaluate` added it afterwards, so that no experiment asks for it."""


@dataclass(frozen=True)
class ModelResults:
    """States and scores of one model."""

    status: State
    """The worst state of training and requested evaluations."""
    evaluations: Sequence[EvaluationResults]
    error: str | None
    """Last line of the first failure."""
    training: State
    train_seconds: float | None
    """Work seconds of a done training, if they were recorded."""


def list_models(grid: Grid, store: Store) -> list[TableModel]:
    """List the models in the order of a table: SFT students, then teachers, then cells."""
    references = sorted(list_references(grid.cells), key=lambda reference: reference.role != "start")
    return [
        *(
            TableModel(role, model.fingerprint, store.get_artifact(grid.scale, role, model), cells, model)
            for role, model, cells in references
        ),
        *(TableModel("cell", cell.fingerprint, store.get_record(cell), [cell]) for cell in grid.cells),
    ]


def name_evaluations(evaluations: Sequence[AnyEvaluation]) -> dict[str, str]:
    """Map each evaluation's folder to its name in columns: `name-fingerprint` if not unique."""
    names = [evaluation.name for evaluation in evaluations]
    return {
        evaluation.folder: name if names.count(name) == 1 else f"{name}-{evaluation.fingerprint}"
        for evaluation, name in zip(evaluations, names, strict=True)
    }


def read_results(record: Record, evaluations: tuple[AnyEvaluation, ...]) -> ModelResults:
    """Read states, scores and first error of a record: one file, and two for each evaluation.

    lm-eval tasks that were added afterwards stand last and do not affect `status`.
    """
    status = record.read_status()
    names = name_evaluations(evaluations)
    parts = [record.get_evaluation(evaluation) for evaluation in evaluations]
    part_statuses = [part.read_status() for part in parts]
    scores = [
        part.read_scores() if part_status.get("state") == "done" else {}
        for part, part_status in zip(parts, part_statuses, strict=True)
    ]
    stored_states = [
        require_metrics(part_status.get("state"), evaluation.metrics, part_scores)
        for part_status, evaluation, part_scores in zip(part_statuses, evaluations, scores, strict=True)
    ]
    state = compute_cell_state(status.get("state"), stored_states, record.is_locked)
    requested = [
        EvaluationResults(names[evaluation.folder], evaluation, part_state, part_scores, is_added=False)
        for evaluation, part_state, part_scores in zip(evaluations, state.evaluations, scores, strict=True)
    ]
    errors = map(get_error_line, [status, *part_statuses])
    return ModelResults(
        status=state.whole,
        evaluations=[*requested, *_read_added_evaluations(record, evaluations, names.values())],
        error=next(filter(None, errors), None),
        training=state.training,
        train_seconds=status.get("seconds") if status.get("state") == "done" else None,
    )


def _read_added_evaluations(
    record: Record, evaluations: Sequence[AnyEvaluation], used_names: Iterable[str]
) -> Iterator[EvaluationResults]:
    """Yield the results of lm-eval tasks that `gkd-lab evaluate` added afterwards, under unique names."""
    folders, taken = {evaluation.folder for evaluation in evaluations}, set(used_names)
    added = [e for e in record.list_harness_evaluations() if e.folder not in folders]
    for evaluation in added:
        name = name_evaluations(added)[evaluation.folder]
        unique = f"{name}-{evaluation.fingerprint}" if name in taken else name
        part: EvaluationRecord = record.get_evaluation(evaluation)
        state = part.read_state()
        scores = part.read_scores() if state == "done" else {}
        yield EvaluationResults(unique, evaluation, state, scores, is_added=True)


def measure_step_seconds(grid: Grid, store: Store) -> dict[str, float]:
    """Map fingerprint to recorded seconds per step, of done cells that ran alone and unbroken."""
    step_seconds = {}
    for cell in grid.cells:
        record = store.get_record(cell)
        seconds = read_step_seconds(record, cell.training.steps)
        if seconds is not None and record.read_state() == "done":
            step_seconds[cell.fingerprint] = seconds
    return step_seconds


def read_step_seconds(record: Record, steps: int) -> float | None:
    """Return a training's recorded seconds per step; None unless it ran alone and unbroken.

    The time of a pack is that of all of its members, so it does not tell the time of one.
    """
    provenance = record.read_provenance()
    seconds = provenance.get("spent", {}).get("seconds")
    ran_alone = len(provenance.get("pack", ())) == 1 and not provenance.get("resumed_at_step")
    return float(seconds) / steps if seconds is not None and ran_alone else None
