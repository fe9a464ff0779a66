"""Table rows: one per cell and one per reference model, missing and failed ones included.

Rows are plain dictionaries, so that nothing heavy is imported.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gkd_lab.config import Cell, Grid, SftModel
from gkd_lab.config.cell import AnyEvaluation, list_references
from gkd_lab.store import EvaluationRecord, Record, Store
from gkd_lab.store.cell_state import compute_cell_state, get_error_line, require_metrics

TableRow = dict[str, Any]

_FIXED_AXES = ("task", "lmbda", "beta", "seed")
_LM_EVAL_DETAILS = ("lm_eval", "task_hash")
"""Version and task hash of an lm-eval score: one column per evaluation."""


def build_table_rows(grid: Grid, store: Store) -> list[TableRow]:
    """Build a dict (column -> value) per SFT student, then per teacher, then per cell."""
    axes = list_extra_axes(grid)
    references = sorted(list_references(grid.cells), key=lambda reference: reference.role != "start")
    reference_rows = [_build_reference_row(grid, store, axes, *reference) for reference in references]
    return [*reference_rows, *(_build_cell_row(grid, store, axes, cell) for cell in grid.cells)]


def list_extra_axes(grid: Grid) -> tuple[str, ...]:
    """Return the grid's axes besides task, lmbda, beta and seed; each is a column."""
    return tuple(axis for axis in grid.axes if axis not in _FIXED_AXES)


def find_headline_column(grid: Grid, task: str) -> str:
    """Return `<evaluation>/<metric>` of a task's main score: first evaluation, its first metric."""
    cell = next(cell for cell in grid.cells if cell.task == task)
    evaluation, metric = get_primary_metric(cell)
    return f"{name_evaluations(cell.evaluations)[evaluation.folder]}/{metric}"


def get_primary_metric(cell: Cell) -> tuple[AnyEvaluation, str]:
    """Return (the cell's first evaluation, name of the first metric of that evaluation)."""
    return cell.evaluations[0], _get_first_metric(cell.evaluations[0])


def _get_first_metric(evaluation: AnyEvaluation) -> str:
    """Return the name of an evaluation's first metric; `acc` for an lm-eval task without any."""
    return next(iter(evaluation.metrics), "acc")


def list_metric_columns(evaluations: tuple[AnyEvaluation, ...]) -> Iterator[str]:
    """Yield the requested score columns with their `.low` and `.high`, scored yet or not.

    A cell with one evaluation has each column under the metric's name alone, too.
    """
    names = name_evaluations(evaluations)
    for evaluation in evaluations:
        first = (_get_first_metric(evaluation),) if evaluation is evaluations[0] else ()
        for metric in dict.fromkeys((*first, *evaluation.metrics)):
            yield from _list_bound_columns(f"{names[evaluation.folder]}/{metric}")
            if len(evaluations) == 1:
                yield from _list_bound_columns(metric)


def _list_bound_columns(name: str) -> tuple[str, str, str]:
    """Return three column names: the score's, and the same with `.low` and `.high`."""
    return name, f"{name}.low", f"{name}.high"


def name_evaluations(evaluations: Sequence[AnyEvaluation]) -> dict[str, str]:
    """Map each evaluation's folder to its name in columns: `name-fingerprint` if not unique."""
    names = [evaluation.name for evaluation in evaluations]
    return {
        evaluation.folder: name if names.count(name) == 1 else f"{name}-{evaluation.fingerprint}"
        for evaluation, name in zip(evaluations, names, strict=True)
    }


def _build_reference_row(
    grid: Grid, store: Store, axes: tuple[str, ...], role: str, model: SftModel, cells: list[Cell]
) -> TableRow:
    """Build a reference model's row; an axis has a value if all cells of the model agree on it."""
    values = {axis: {encode_axis_value(cell.labels[axis]) for cell in cells} for axis in axes}
    shared = {axis: options.pop() if len(options) == 1 else None for axis, options in values.items()}
    return {
        "cell": model.fingerprint,
        "role": role,
        "task": model.task,
        **dict.fromkeys(("lmbda", "beta", "seed")),
        **shared,
        **_read_results(store.get_artifact(grid.scale, role, model), cells[0].evaluations),
    }


def _build_cell_row(grid: Grid, store: Store, axes: tuple[str, ...], cell: Cell) -> TableRow:
    """Build a trained cell's row: settings, status, scores, start, teacher and `stands_for`."""
    points = grid.stands_for.get(cell.full_fingerprint)
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
        "stands_for": None if points is None else [dict(point) for point in points],
    }


def _read_results(record: Record, evaluations: tuple[AnyEvaluation, ...]) -> TableRow:
    """Read status, state per evaluation, score columns and first error of a record.

    Reads one file, and two for each evaluation. Added lm-eval tasks have columns and do not affect `status`.
    """
    status = record.read_status()
    stored_states, errors, scores = [], [get_error_line(status)], {}
    names = name_evaluations(evaluations)
    for evaluation in evaluations:
        part = record.get_evaluation(evaluation)
        part_status = part.read_status()
        errors.append(get_error_line(part_status))
        stored_state = part_status.get("state")
        stored = part.read_scores() if stored_state == "done" else {}
        name = names[evaluation.folder]
        scores.update(_flatten_scores(stored, name, include_short_names=len(evaluations) == 1))
        stored_states.append(require_metrics(stored_state, evaluation.metrics, stored))
    state = compute_cell_state(status.get("state"), stored_states, record.is_locked)
    states = dict(zip(names.values(), state.evaluations, strict=True))
    for name, part in _find_added_evaluations(record, evaluations, names.values()):
        states[name] = part.read_state()
        stored = part.read_scores() if states[name] == "done" else {}
        scores.update(_flatten_scores(stored, name, include_short_names=False))
    return {
        "status": state.whole,
        "evaluations": states,
        **scores,
        "error": next(filter(None, errors), None),
    }


def _find_added_evaluations(
    record: Record, evaluations: Sequence[AnyEvaluation], used_names: Iterable[str]
) -> Iterator[tuple[str, EvaluationRecord]]:
    """Yield (unique name, record) of lm-eval tasks that `gkd-lab evaluate` added afterwards."""
    folders, taken = {evaluation.folder for evaluation in evaluations}, set(used_names)
    added = [e for e in record.list_harness_evaluations() if e.folder not in folders]
    for evaluation in added:
        name = name_evaluations(added)[evaluation.folder]
        unique = f"{name}-{evaluation.fingerprint}" if name in taken else name
        yield unique, record.get_evaluation(evaluation)


def _flatten_scores(
    scores: Mapping[str, Mapping[str, Any]], name: str, include_short_names: bool
) -> TableRow:
    """Return columns `<name>/<metric>`, their `.low` and `.high`, and lm-eval's details.

    With `include_short_names` each metric has columns under its name alone, too.
    """
    columns: TableRow = {}
    for metric, score in scores.items():
        for column in (f"{name}/{metric}", metric) if include_short_names else (f"{name}/{metric}",):
            columns[column] = score.get("value")
            columns.update({f"{column}.{end}": score[end] for end in ("low", "high") if end in score})
        columns.update({f"{name}.{detail}": score[detail] for detail in _LM_EVAL_DETAILS if detail in score})
    return columns


def encode_axis_value(value: Any) -> Any:
    """Return a scalar or None as it is, anything else as JSON text, so that it fits a table cell."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True, default=_dump_value)


def _dump_value(value: Any) -> Any:
    """Return an iterable as a list, a pydantic model as a dict: the `default` of json.dumps."""
    return list(value) if isinstance(value, Iterable) else value.model_dump(mode="json")
