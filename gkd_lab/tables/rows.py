"""One row a cell, one a reference model: what was asked for and what exists, compared openly.

Missing and failed parts are rows too. Plain dictionaries, so that nothing heavy is imported.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gkd_lab.config import Cell, Grid, SftModel
from gkd_lab.config.cell import AnyEvaluation, list_references
from gkd_lab.store import EvaluationRecord, Record, Store
from gkd_lab.store.cell_state import compute_cell_state, get_error_line, judge_evaluation

TableRow = dict[str, Any]

_FIXED_AXES = ("task", "lmbda", "beta", "seed")
_LM_EVAL_DETAILS = ("lm_eval", "task_hash")
"""What says of an lm-eval score which version and which task gave it; a column for each evaluation."""


def build_table_rows(grid: Grid, store: Store) -> list[TableRow]:
    """The reference models (starts, then teachers), then the cells, both in the grid's order."""
    axes = list_extra_axes(grid)
    starts_first = sorted(list_references(grid.cells), key=lambda known: known.role != "start")
    known = [_build_reference_row(grid, store, axes, *one) for one in starts_first]
    return [*known, *(_build_cell_row(grid, store, axes, cell) for cell in grid.cells)]


def list_extra_axes(grid: Grid) -> tuple[str, ...]:
    """The axes that are columns of their own beside task, lmbda, beta and seed."""
    return tuple(axis for axis in grid.axes if axis not in _FIXED_AXES)


def find_headline_column(grid: Grid, task: str) -> str:
    """Column of the score that a task is judged by: first metric of the first evaluation."""
    cell = next(cell for cell in grid.cells if cell.task == task)
    first, metric = get_primary_metric(cell)
    return f"{name_evaluations(cell.evaluations)[first.folder]}/{metric}"


def get_primary_metric(cell: Cell) -> tuple[AnyEvaluation, str]:
    """The first evaluation and its first metric; of a task of lm-eval that names none, `acc`."""
    return cell.evaluations[0], _get_first_metric(cell.evaluations[0])


def _get_first_metric(evaluation: AnyEvaluation) -> str:
    return next(iter(evaluation.metrics), "acc")


def list_metric_columns(evaluations: tuple[AnyEvaluation, ...]) -> Iterator[str]:
    """The score columns that a cell's evaluations ask for, whether or not they are there."""
    names = name_evaluations(evaluations)
    for evaluation in evaluations:
        leading = (_get_first_metric(evaluation),) if evaluation is evaluations[0] else ()
        for metric in dict.fromkeys((*leading, *evaluation.metrics)):
            yield from _list_bound_columns(f"{names[evaluation.folder]}/{metric}")
            if len(evaluations) == 1:
                yield from _list_bound_columns(metric)


def _list_bound_columns(name: str) -> tuple[str, str, str]:
    return name, f"{name}.low", f"{name}.high"


def name_evaluations(evaluations: Sequence[AnyEvaluation]) -> dict[str, str]:
    """Folder -> name in columns; with the fingerprint where two evaluations have one name."""
    names = [evaluation.name for evaluation in evaluations]
    return {
        evaluation.folder: name if names.count(name) == 1 else f"{name}-{evaluation.fingerprint}"
        for evaluation, name in zip(evaluations, names, strict=True)
    }


def _build_reference_row(
    grid: Grid,
    store: Store,
    axes: tuple[str, ...],
    role: str,
    model: SftModel,
    cells: list[Cell],
) -> TableRow:
    """An axis value stands in the row where all cells that use the model agree on it."""
    values = {axis: {encode_axis_value(cell.labels[axis]) for cell in cells} for axis in axes}
    shared = {axis: found.pop() if len(found) == 1 else None for axis, found in values.items()}
    return {
        "cell": model.fingerprint,
        "role": role,
        "task": model.task,
        **dict.fromkeys(("lmbda", "beta", "seed")),
        **shared,
        **_read_results(store.get_artifact(grid.scale, role, model), cells[0].evaluations),
    }


def _build_cell_row(grid: Grid, store: Store, axes: tuple[str, ...], cell: Cell) -> TableRow:
    twins = grid.stands_for.get(cell.full_fingerprint)
    return {
        "cell": cell.fingerprint,
        "role": "cell",
        "task": cell.task,
        "lmbda": cell.lmbda,
        "beta": cell.beta,
        "seed": cell.seed,
        **{axis: encode_axis_value(cell.labels[axis]) for axis in axes},
        **_read_results(store.get_record(cell), cell.evaluations),
        "start_cell": cell.training.start.fingerprint,
        "teacher_cell": cell.training.teacher.fingerprint,
        "stands_for": None if twins is None else [dict(point) for point in twins],
    }


def _read_results(record: Record, evaluations: tuple[AnyEvaluation, ...]) -> TableRow:
    """Status, scores and first error of a record: one file to read, and two for an evaluation."""
    status = record.read_status()
    verdicts, errors, scores = [], [get_error_line(status)], {}
    names = name_evaluations(evaluations)
    for evaluation in evaluations:
        evaluation_record = record.get_evaluation(evaluation)
        evaluation_status = evaluation_record.read_status()
        errors.append(get_error_line(evaluation_status))
        verdict = evaluation_status.get("state")
        metrics = evaluation_record.read_scores() if verdict == "done" else {}
        scores.update(
            _flatten_scores(metrics, names[evaluation.folder], include_short_names=len(evaluations) == 1)
        )
        verdicts.append(judge_evaluation(verdict, evaluation.metrics, metrics))
    state = compute_cell_state(status.get("state"), verdicts, record.is_locked)
    states = dict(zip(names.values(), state.evaluations, strict=True))
    for name, evaluation_record in _find_added_evaluations(record, evaluations, names.values()):
        states[name] = evaluation_record.read_state()
        metrics = evaluation_record.read_scores() if states[name] == "done" else {}
        scores.update(_flatten_scores(metrics, name, include_short_names=False))
    return {
        "status": state.whole,
        "evaluations": states,
        **scores,
        "error": next(filter(None, errors), None),
    }


def _find_added_evaluations(
    record: Record, evaluations: Sequence[AnyEvaluation], used_names: Iterable[str]
) -> Iterator[tuple[str, EvaluationRecord]]:
    """What `gkd-lab evaluate` added: tasks of lm-eval that no experiment asks for count for no status."""
    asked, taken = {evaluation.folder for evaluation in evaluations}, set(used_names)
    found = [one for one in record.list_harness_evaluations() if one.folder not in asked]
    for evaluation in found:
        name = name_evaluations(found)[evaluation.folder]
        single = name not in taken
        yield name if single else f"{name}-{evaluation.fingerprint}", record.get_evaluation(evaluation)


def _flatten_scores(
    scores: Mapping[str, Mapping[str, Any]], name: str, include_short_names: bool
) -> TableRow:
    found: TableRow = {}
    for metric, score in scores.items():
        for column in (f"{name}/{metric}", metric) if include_short_names else (f"{name}/{metric}",):
            found[column] = score.get("value")
            for end in ("low", "high"):
                if end in score:
                    found[f"{column}.{end}"] = score[end]
        for fact in _LM_EVAL_DETAILS:
            if fact in score:
                found[f"{name}.{fact}"] = score[fact]
    return found


def encode_axis_value(value: Any) -> Any:
    """An axis value as one cell of a table: what is not a number, text or null becomes JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True, default=_dump_value)


def _dump_value(value: Any) -> Any:
    return list(value) if isinstance(value, Iterable) else value.model_dump(mode="json")
