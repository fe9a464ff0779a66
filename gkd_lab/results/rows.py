"""One row a cell, one a reference model: what was asked for and what exists, compared openly.

Missing and failed parts are rows too. Plain dictionaries, so that nothing heavy is imported.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gkd_lab.records import Record, State, Store, worst
from gkd_lab.spec import Cell, Evaluation, GridOfCells, SftModel
from gkd_lab.spec.cell import references

Row = dict[str, Any]

_OWN_COLUMNS = ("task", "lmbda", "beta", "seed")


def rows(grid: GridOfCells, store: Store) -> list[Row]:
    """The reference models (starts, then teachers), then the cells, both in the grid's order."""
    axes = extra_axes(grid)
    starts_first = sorted(references(grid.cells), key=lambda known: known.role != "start")
    known = [_reference_row(grid, store, axes, *one) for one in starts_first]
    return [*known, *(_cell_row(grid, store, axes, cell) for cell in grid.cells)]


def extra_axes(grid: GridOfCells) -> tuple[str, ...]:
    """The axes that are columns of their own beside task, lmbda, beta and seed."""
    return tuple(axis for axis in grid.axes if axis not in _OWN_COLUMNS)


def headline(grid: GridOfCells, task: str) -> str:
    """Column of the score that a task is judged by: first metric of the first evaluation."""
    cell = next(cell for cell in grid.cells if cell.task == task)
    first = cell.evaluations[0]
    return f"{_names(cell.evaluations)[first.folder]}/{first.metrics[0]}"


def metric_columns(evaluations: tuple[Evaluation, ...]) -> Iterator[str]:
    """The score columns that a cell's evaluations ask for, whether or not they are there."""
    names = _names(evaluations)
    for evaluation in evaluations:
        for metric in evaluation.metrics:
            yield from _bounds(f"{names[evaluation.folder]}/{metric}")
            if len(evaluations) == 1:
                yield from _bounds(metric)


def _bounds(name: str) -> tuple[str, str, str]:
    return name, f"{name}.low", f"{name}.high"


def _names(evaluations: tuple[Evaluation, ...]) -> dict[str, str]:
    """Folder -> name in columns; with the fingerprint where two evaluations have one name."""
    names = [evaluation.name for evaluation in evaluations]
    return {
        evaluation.folder: name if names.count(name) == 1 else f"{name}-{evaluation.fingerprint}"
        for evaluation, name in zip(evaluations, names, strict=True)
    }


def _reference_row(
    grid: GridOfCells,
    store: Store,
    axes: tuple[str, ...],
    role: str,
    model: SftModel,
    users: list[Cell],
) -> Row:
    """An axis value stands in the row where all cells that use the model agree on it."""
    values = {axis: {plain(cell.labels[axis]) for cell in users} for axis in axes}
    shared = {axis: found.pop() if len(found) == 1 else None for axis, found in values.items()}
    return {
        "cell": model.fingerprint,
        "role": role,
        "task": model.task,
        **dict.fromkeys(("lmbda", "beta", "seed")),
        **shared,
        **_results(store.artifact(grid.scale, role, model), users[0].evaluations),
    }


def _cell_row(grid: GridOfCells, store: Store, axes: tuple[str, ...], cell: Cell) -> Row:
    twins = grid.stands_for.get(cell.full_fingerprint)
    return {
        "cell": cell.fingerprint,
        "role": "cell",
        "task": cell.task,
        "lmbda": cell.lmbda,
        "beta": cell.beta,
        "seed": cell.seed,
        **{axis: plain(cell.labels[axis]) for axis in axes},
        **_results(store.of(cell), cell.evaluations),
        "start_cell": cell.training.start.fingerprint,
        "teacher_cell": cell.training.teacher.fingerprint,
        "stands_for": None if twins is None else [dict(point) for point in twins],
    }


def _results(record: Record, evaluations: tuple[Evaluation, ...]) -> Row:
    """Status, scores and first error of a record: one file to read, and two for an evaluation."""
    status = record.status()
    state: State = status.get("state") or _unfinished(record)
    states, errors, scores = {}, [_last_line(status)], {}
    names = _names(evaluations)
    for evaluation in evaluations:
        judged = record.evaluation(evaluation)
        verdict = judged.status()
        name = names[evaluation.folder]
        states[name] = verdict.get("state") or ("missing" if state == "failed" else _unfinished(record))
        errors.append(_last_line(verdict))
        if states[name] == "done":
            found = judged.scores()
            scores.update(_scores(found, name, plain=len(evaluations) == 1))
            if not set(evaluation.metrics) <= set(found):
                states[name] = _unfinished(record)
    return {
        "status": worst([state, *states.values()]),
        "evaluations": states,
        **scores,
        "error": next(filter(None, errors), None),
    }


def _unfinished(record: Record) -> State:
    return "running" if record.is_claimed() else "missing"


def _scores(scores: Mapping[str, Mapping[str, Any]], name: str, plain: bool) -> Row:
    found: Row = {}
    for metric, score in scores.items():
        for column in (f"{name}/{metric}", metric) if plain else (f"{name}/{metric}",):
            found[column] = score.get("value")
            for end in ("low", "high"):
                if end in score:
                    found[f"{column}.{end}"] = score[end]
    return found


def _last_line(status: Mapping[str, Any]) -> str | None:
    lines = str(status.get("error") or "").strip().splitlines()
    if status.get("state") != "failed":
        return None
    return lines[-1] if lines else "failed without a message"


def plain(value: Any) -> Any:
    """An axis value as one cell of a table: what is not a number, text or null becomes JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True, default=_as_data)


def _as_data(value: Any) -> Any:
    return list(value) if isinstance(value, Iterable) else value.model_dump(mode="json")
