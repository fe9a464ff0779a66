"""One row a cell, one a reference model: what was asked for and what exists, compared openly.

Missing and failed parts are rows too. Plain dictionaries, so that nothing heavy is imported.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gkd_lab.config import Cell, GridOfCells, SftModel
from gkd_lab.config.cell import AnyEvaluation, references
from gkd_lab.store import EvaluationRecord, Record, State, Store, worst

Row = dict[str, Any]

_OWN_COLUMNS = ("task", "lmbda", "beta", "seed")
_OF_TASK = ("lm_eval", "task_hash")
"""What says of an lm-eval score which version and which task gave it; a column for each evaluation."""


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
    first, metric = judged_by(cell)
    return f"{evaluation_names(cell.evaluations)[first.folder]}/{metric}"


def judged_by(cell: Cell) -> tuple[AnyEvaluation, str]:
    """The first evaluation and its first metric; of a task of lm-eval that names none, `acc`."""
    return cell.evaluations[0], _leading(cell.evaluations[0])


def _leading(evaluation: AnyEvaluation) -> str:
    return next(iter(evaluation.metrics), "acc")


def metric_columns(evaluations: tuple[AnyEvaluation, ...]) -> Iterator[str]:
    """The score columns that a cell's evaluations ask for, whether or not they are there."""
    names = evaluation_names(evaluations)
    for evaluation in evaluations:
        leading = (_leading(evaluation),) if evaluation is evaluations[0] else ()
        for metric in dict.fromkeys((*leading, *evaluation.metrics)):
            yield from _bounds(f"{names[evaluation.folder]}/{metric}")
            if len(evaluations) == 1:
                yield from _bounds(metric)


def _bounds(name: str) -> tuple[str, str, str]:
    return name, f"{name}.low", f"{name}.high"


def evaluation_names(evaluations: Sequence[AnyEvaluation]) -> dict[str, str]:
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


def _results(record: Record, evaluations: tuple[AnyEvaluation, ...]) -> Row:
    """Status, scores and first error of a record: one file to read, and two for an evaluation."""
    status = record.status()
    state: State = status.get("state") or _unfinished(record)
    states, errors, scores = {}, [_last_line(status)], {}
    names = evaluation_names(evaluations)
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
    whole = worst([state, *states.values()])
    for name, judged in _unasked(record, evaluations, names.values()):
        states[name] = judged.state()
        scores.update(_scores(judged.scores() if states[name] == "done" else {}, name, plain=False))
    return {
        "status": whole,
        "evaluations": states,
        **scores,
        "error": next(filter(None, errors), None),
    }


def _unasked(
    record: Record, evaluations: Sequence[AnyEvaluation], names: Iterable[str]
) -> Iterator[tuple[str, EvaluationRecord]]:
    """What `gkd-lab evaluate` added: tasks of lm-eval that no experiment asks for count for no status."""
    asked, taken = {evaluation.folder for evaluation in evaluations}, set(names)
    found = [one for one in record.harness_evaluations() if one.folder not in asked]
    for evaluation in found:
        name = evaluation_names(found)[evaluation.folder]
        single = name not in taken
        yield name if single else f"{name}-{evaluation.fingerprint}", record.evaluation(evaluation)


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
        for fact in _OF_TASK:
            if fact in score:
                found[f"{name}.{fact}"] = score[fact]
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
