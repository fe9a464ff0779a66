"""Results of the models of a grid, read from their records: states, scores, errors and training times."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gkd_lab.config import Cell, Grid, SftModel
from gkd_lab.config.artifact_specs import get_artifact_folder
from gkd_lab.config.cell import AnyEvaluation, list_references
from gkd_lab.config.packs import drop_model_seeds
from gkd_lab.store import EvaluationRecord, Record, Store
from gkd_lab.store.cell_state import State, compute_cell_state, get_error_line, require_metrics
from gkd_lab.store.index import RecordFacts, RecordIndex

ModelRole = Literal["cell", "start", "teacher"]
Scores = Mapping[str, Mapping[str, Any]]
"""Metric -> `{"value", "low", "high", "n", ...}`, as `scores.json` stores them."""

_EVALUATION_FILES = ("status.json", "scores.json")
_SCORE_FIELDS = ("value", "low", "high", "n", "lm_eval", "task_hash")
"""Fields of a score that a table needs."""


@dataclass(frozen=True)
class TableModel:
    """A model of a table: a cell's student, an SFT student (role `start`) or a teacher."""

    role: ModelRole
    fingerprint: str
    store: Store
    folder: str
    """Folder of its record, relative to the outputs."""
    cells: Sequence[Cell]
    """The cell itself, or the cells that need the reference model."""
    spec: SftModel | None = None
    """Specification of a reference model."""
    seed: int | None = None
    """Of a cell, and of an SFT student that each seed has one of."""

    @property
    def record(self) -> Record:
        """Record of the model, whether or not its files exist."""
        return Record(self.store.root / self.folder)

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
    unbroken_seconds: float | None
    """Seconds of a training that ran alone and unbroken, if they were recorded."""


def list_models(grid: Grid, store: Store) -> list[TableModel]:
    """List the models in the order of a table: SFT students, then teachers, then cells."""
    references = sorted(list_references(grid.cells), key=lambda reference: reference.role != "start")
    counts = Counter(drop_model_seeds(model) for role, model, _ in references if role == "start")
    models = []
    for role, model, cells in references:
        folder, seeds = get_artifact_folder(grid.scale, role, model), {cell.seed for cell in cells}
        has_own_seed = role == "start" and len(seeds) == 1 and counts[drop_model_seeds(model)] > 1
        seed = seeds.pop() if has_own_seed else None
        models.append(TableModel(role, model.fingerprint, store, folder, cells, model, seed))
    for cell in grid.cells:
        models.append(TableModel("cell", cell.fingerprint, store, cell.folder, [cell], seed=cell.seed))
    return models


def name_evaluations(evaluations: Sequence[AnyEvaluation]) -> dict[str, str]:
    """Map each evaluation's folder to its name in columns: `name-fingerprint` if not unique."""
    names = [evaluation.name for evaluation in evaluations]
    return {
        evaluation.folder: name if names.count(name) == 1 else f"{name}-{evaluation.fingerprint}"
        for evaluation, name in zip(evaluations, names, strict=True)
    }


def read_results(models: Sequence[TableModel], store: Store) -> list[ModelResults]:
    """Read states, scores and first error of each model: one file, and two for each evaluation.

    What the records of a large store say is cached. lm-eval tasks that were added afterwards stand last and
    do not affect `status`.
    """
    index, results = RecordIndex(store.root, "scores"), []
    plans: dict[int, _ReadingPlan] = {}
    for model in models:
        plan = plans.get(id(model.evaluations))
        if plan is None:
            plan = plans[id(model.evaluations)] = _ReadingPlan(model.evaluations)
        results.append(_read_model(model, plan, index))
    index.save()
    return results


class _ReadingPlan:
    """Names and files of a tuple of evaluations, which most models of a grid share."""

    def __init__(self, evaluations: tuple[AnyEvaluation, ...]) -> None:
        names = name_evaluations(evaluations)
        self.folders = list(names)
        self.evaluations = [(names[e.folder], e, frozenset(e.metrics)) for e in evaluations]
        parts = [f"evaluations/{folder}/{name}" for folder in self.folders for name in _EVALUATION_FILES]
        self.files = ["status.json", "provenance.json", "evaluations", *parts]


def _read_model(model: TableModel, plan: _ReadingPlan, index: RecordIndex) -> ModelResults:
    """Return the results of one model, from the index where its files did not change."""
    facts = index.get_facts(model.folder, plan.files, lambda: _collect_facts(model.record, plan))
    parts = list(zip(plan.evaluations, facts["evaluations"], strict=True))
    stored_states = [
        require_metrics(part["state"], metrics, part["scores"]) for (_, _, metrics), part in parts
    ]
    state = compute_cell_state(facts["state"], stored_states, lambda: model.record.is_locked())
    evaluations = [
        EvaluationResults(name, evaluation, part_state, part["scores"], is_added=False)
        for ((name, evaluation, _), part), part_state in zip(parts, state.evaluations, strict=True)
    ]
    if facts["has_added"]:
        evaluations += _read_added_evaluations(model.record, model.evaluations)
    errors = [facts["error"], *(part["error"] for _, part in parts)]
    return ModelResults(
        status=state.whole,
        evaluations=evaluations,
        error=next(filter(None, errors), None),
        training=state.training,
        train_seconds=facts["seconds"],
        unbroken_seconds=facts["unbroken_seconds"],
    )


def _collect_facts(record: Record, plan: _ReadingPlan) -> RecordFacts:
    """Read what the index stores: state, seconds and error, the same and scores of each evaluation."""
    status = record.read_status()
    state = status.get("state")
    folder = record.folder / "evaluations"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {
        "state": state,
        "error": get_error_line(status),
        "seconds": status.get("seconds") if state == "done" else None,
        "unbroken_seconds": _read_unbroken_seconds(record) if state == "done" else None,
        "evaluations": [_collect_evaluation_facts(EvaluationRecord(folder / name)) for name in plan.folders],
        "has_added": any(name.startswith("lm_eval-") for name in names.difference(plan.folders)),
    }


def _collect_evaluation_facts(part: EvaluationRecord) -> RecordFacts:
    """Read state and error of an evaluation, and what a table needs of its scores."""
    status = part.read_status()
    scores = part.read_scores() if status.get("state") == "done" else {}
    return {"state": status.get("state"), "error": get_error_line(status), "scores": _shorten_scores(scores)}


def _shorten_scores(scores: Scores) -> dict[str, dict[str, Any]]:
    """Return scores with the fields that a table needs."""
    return {
        metric: {name: score[name] for name in _SCORE_FIELDS if name in score}
        for metric, score in scores.items()
    }


def _read_added_evaluations(
    record: Record, evaluations: Sequence[AnyEvaluation]
) -> Iterator[EvaluationResults]:
    """Yield the results of lm-eval tasks that `gkd-lab evaluate` added afterwards, under unique names."""
    names = name_evaluations(evaluations)
    added = [e for e in record.list_harness_evaluations() if e.folder not in names]
    for evaluation in added:
        name = name_evaluations(added)[evaluation.folder]
        unique = f"{name}-{evaluation.fingerprint}" if name in names.values() else name
        part = record.get_evaluation(evaluation)
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
    """Return a training's recorded seconds per step; None unless it ran alone and unbroken."""
    seconds = _read_unbroken_seconds(record)
    return None if seconds is None else seconds / steps


def _read_unbroken_seconds(record: Record) -> float | None:
    """Return a training's recorded seconds; None unless it ran alone and unbroken.

    The time of a pack is that of all of its members, so it does not tell the time of one.
    """
    provenance = record.read_provenance()
    seconds = provenance.get("spent", {}).get("seconds")
    ran_alone = len(provenance.get("pack", ())) == 1 and not provenance.get("resumed_at_step")
    return float(seconds) if seconds is not None and ran_alone else None
