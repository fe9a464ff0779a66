"""Long results table: a row per model, evaluation and metric, built by columns.

A missing score is a row with NaN. Training times are metrics of rows without an evaluation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gkd_lab.config import Cell, Evaluation, Grid
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.store import Store
from gkd_lab.store.cell_state import State
from gkd_lab.tables.cell_facts import FACT_COLUMNS, read_cell_facts
from gkd_lab.tables.results import (
    ModelResults,
    Scores,
    TableModel,
    list_models,
    read_results,
)
from gkd_lab.tables.rows import find_shared_label, list_extra_axes, list_requested_metrics
from gkd_lab.tables.table import convert_integers

LEADING_COLUMNS = (
    "cell", "role", "scale", "task", "student", "teacher", "seed", "lmbda", "divergence", "beta",
)  # fmt: skip
SCORE_COLUMNS = (
    "evaluation", "decoding", "temperature", "split", "metric", "value", "low", "high", "n_examples",
)  # fmt: skip
TRAILING_COLUMNS = (
    "start_cell", "teacher_cell", "stands_for", "status", "error",
    "evaluation_status", "origin", "checkpoint", "lm_eval", "task_hash",
)  # fmt: skip
_TYPES = {
    "str": (
        "cell", "role", "scale", "task", "student", "teacher", "divergence", "evaluation", "decoding",
        "checkpoint", "split", "metric", "text", "anchor", "start_cell", "teacher_cell", "status", "error",
        "evaluation_status", "origin", "lm_eval", "task_hash",
    ),
    "float64": (
        "lmbda", "beta", "temperature", "value", "low", "high", "distillation_share", "teacher_temperature",
        "learning_rate",
    ),
    "Int64": ("seed", "n_examples", "train_rows"),
    "boolean": ("reward", "self_distillation"),
}  # fmt: skip
COLUMN_TYPES = {name: column_type for column_type, names in _TYPES.items() for name in names}
"""Type of each column that has one whatever its values are."""
_EVALUATION_SETTINGS = ("decoding", "temperature", "checkpoint", "split")
_NO_SCORE: dict[str, Any] = {}
_CELL_COLUMNS = (
    "lmbda", "divergence", "beta", *FACT_COLUMNS, "start_cell", "teacher_cell", "stands_for",
)  # fmt: skip
_FIXED_AXES = ("student", "teacher", "divergence")
"""Axes that have a column of their own whether or not they are declared."""
AXIS_COLUMNS = {"temperature": "sampling_temperature"}
"""Axis -> its column, where another column has the axis's name: `temperature` is that of an evaluation."""


def build_long_table(grid: Grid, store: Store) -> pd.DataFrame:
    """Build the results table as a data frame: a row per model, evaluation and metric.

    Models are SFT students, teachers and cells, in this order (`role`: start, teacher, cell). Columns:

    * `cell` (fingerprint), `role`, `scale`, `task`, names of `student` and `teacher`, `seed`, `lmbda`,
      `divergence`, `beta`, then the other declared axes; a reference model has the values that all of its
      cells share;
    * `evaluation`, `decoding`, `temperature`, `split`, `metric`, `value`, `low`, `high` (95 % interval over
      examples), `n_examples`. Every requested score has a row, NaN while it is missing;
    * the facts of `read_cell_facts`, `start_cell` and `teacher_cell` (rows to compare with), `stands_for`
      (the grid points of a collapsed cell), `status` (the worst of the model's parts), `error`;
    * `evaluation_status`; `origin` of a score: `requested`, `stored` beside the requested ones, or `added` by
      `gkd-lab evaluate`; `checkpoint`, the weights that were decoded (`last`, or `best` on validation rows);
      version and task hash of an lm-eval score.

    `train_seconds` and `step_seconds` (of cells that trained alone and unbroken) are metrics of rows
    without an evaluation. `attrs["axes"]` names the declared axes of the wide form.
    """
    models = list_models(grid, store)
    results = read_results(models, store)
    model_rows = [
        {**_describe_model(grid, model), "status": result.status, "error": result.error}
        for model, result in zip(models, results, strict=True)
    ]
    blocks = [
        block
        for number, (model, result) in enumerate(zip(models, results, strict=True))
        for block in _list_blocks(number, model, result)
    ]
    return _join_rows(model_rows, blocks, list_extra_axes(grid))


def list_axes(long: pd.DataFrame) -> list[str]:
    """Return the declared axes besides task, lmbda, divergence, beta and seed, each a column.

    `student` and `teacher` are among them where they vary among the cells of a task.
    """
    cells = long[long["role"] == "cell"]
    models = [
        name
        for name in ("student", "teacher")
        if (cells.groupby("task", sort=False)[name].nunique(dropna=False) > 1).any()
    ]
    columns = list(long.columns)
    return [*models, *columns[columns.index("beta") + 1 : columns.index("evaluation")]]


# ---- frame ----


class _ScoreBlock(NamedTuple):
    """Rows of one evaluation of a model, or of its training times."""

    model: int
    """Number of the model."""
    evaluation: str | None
    """Name in columns; None for training times."""
    settings: Mapping[str, Any]
    """`decoding`, `temperature` and `split`; empty for lm-eval tasks and training times."""
    state: State | None
    metrics: Sequence[str | None]
    """A single None for an evaluation without a requested or stored score."""
    origins: Sequence[str | None]
    scores: Scores


def _join_rows(
    model_rows: Sequence[Mapping[str, Any]], blocks: Sequence[_ScoreBlock], axes: Sequence[str]
) -> pd.DataFrame:
    """Return the long table of models and the blocks of their scores; `axes` are those of the wide form."""
    other_axes = [AXIS_COLUMNS.get(axis, axis) for axis in axes if axis not in _FIXED_AXES]
    facts = [name for name in FACT_COLUMNS if name not in other_axes]
    columns = [*LEADING_COLUMNS, *other_axes, *SCORE_COLUMNS, *facts, *TRAILING_COLUMNS]
    scores = _build_score_frame(blocks)
    model_columns = {
        name: [row[name] for row in model_rows] for name in columns if name not in scores.columns
    }
    model_columns |= {name: convert_integers(model_columns[name]) for name in other_axes}
    models = pd.DataFrame(model_columns).take(scores["model"].to_numpy()).reset_index(drop=True)
    frame = pd.concat([models, scores], axis="columns")[columns]
    frame = frame.astype({name: COLUMN_TYPES[name] for name in columns if name in COLUMN_TYPES.keys() - axes})
    frame.attrs["axes"] = [AXIS_COLUMNS.get(axis, axis) for axis in axes]
    return frame


def _build_score_frame(blocks: Sequence[_ScoreBlock]) -> pd.DataFrame:
    """Return a frame with a row per score; its column `model` is the number of the model."""
    per_block: dict[str, Any] = {
        "model": [block.model for block in blocks],
        "evaluation": [block.evaluation for block in blocks],
        **{name: [block.settings.get(name) for block in blocks] for name in _EVALUATION_SETTINGS},
        "evaluation_status": [block.state for block in blocks],
    }
    counts = [len(block.metrics) for block in blocks]
    scores = [block.scores.get(metric or "", _NO_SCORE) for block in blocks for metric in block.metrics]
    numbers = {
        name: np.array([score.get(name) for score in scores], dtype="float64")
        for name in ("value", "low", "high", "n")
    }
    per_score: dict[str, Any] = {
        "metric": [metric for block in blocks for metric in block.metrics],
        "origin": [origin for block in blocks for origin in block.origins],
        "n_examples": pd.array(numbers.pop("n"), dtype="Int64"),
        **{name: [score.get(name) for score in scores] for name in ("lm_eval", "task_hash")},
    }
    rows = pd.DataFrame(per_block).take(np.repeat(np.arange(len(blocks)), counts)).reset_index(drop=True)
    return rows.assign(**numbers, **per_score)


# ---- models and their scores ----


def _describe_model(grid: Grid, model: TableModel) -> dict[str, Any]:
    """Return a model's settings, facts, axis values, links to its reference models and grid points.

    Null for a reference model: what only cells have, and the axes that its cells do not share.
    """
    is_cell, cell = model.role == "cell", model.cells[0]
    return {
        "cell": model.fingerprint,
        "role": model.role,
        "scale": grid.scale,
        "task": cell.task,
        "student": _get_model_name(grid, model, "student"),
        "teacher": _get_model_name(grid, model, "teacher"),
        **(_describe_cell(grid, cell) if is_cell else dict.fromkeys(_CELL_COLUMNS)),
        "seed": model.seed,
        **{
            AXIS_COLUMNS.get(axis, axis): find_shared_label(model, axis)
            for axis in list_extra_axes(grid)
            if axis not in _FIXED_AXES or (axis == "divergence" and not is_cell)
        },
    }


def _get_model_name(grid: Grid, model: TableModel, role: str) -> Any:
    """Return the name of a model's `student` or `teacher`: the axis value, else the name in the spec.

    An SFT student is its own student, a teacher its own teacher; else a reference model has the name that
    all of its cells share, or None.
    """
    if role in grid.axes:
        return find_shared_label(model, role)
    if model.spec is not None and (model.role == "teacher") == (role == "teacher"):
        return model.spec.model.name
    specs = [cell.training.teacher if role == "teacher" else cell.training.start for cell in model.cells]
    names = {spec.model.name for spec in specs}
    return names.pop() if len(names) == 1 else None


def _describe_cell(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Return a value per column of `_CELL_COLUMNS`."""
    return {
        "lmbda": cell.lmbda,
        "divergence": cell.divergence,
        "beta": cell.beta,
        **read_cell_facts(cell),
        "start_cell": cell.training.start.fingerprint,
        "teacher_cell": cell.training.teacher.fingerprint,
        "stands_for": _rename_axes(grid.stands_for.get(cell.full_fingerprint)),
    }


def _rename_axes(points: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return the grid points of a collapsed cell with the names of columns instead of those of axes."""
    if points is None:
        return None
    return [{AXIS_COLUMNS.get(axis, axis): value for axis, value in point.items()} for point in points]


def _read_evaluation_settings(evaluation: AnyEvaluation) -> dict[str, Any]:
    """Return decoding, temperature, checkpoint and split; nothing for an lm-eval task."""
    is_decoding = isinstance(evaluation, Evaluation)
    return {name: getattr(evaluation, name) for name in _EVALUATION_SETTINGS} if is_decoding else {}


def _list_blocks(number: int, model: TableModel, result: ModelResults) -> Iterator[_ScoreBlock]:
    """Yield a block per evaluation, then that of a cell's training times if any was recorded."""
    for part in result.evaluations:
        is_first = part is result.evaluations[0]
        requested = () if part.is_added else list_requested_metrics(part.evaluation, is_first)
        settings = _read_evaluation_settings(part.evaluation)
        metrics, origins = _list_origins(requested, part.scores, part.is_added)
        yield _ScoreBlock(number, part.name, settings, part.state, metrics, origins, part.scores)
    if model.role == "cell" and result.training == "done":
        total, steps = result.unbroken_seconds, model.cells[0].training.steps
        step_seconds = None if total is None else total / steps
        seconds = {"train_seconds": result.train_seconds, "step_seconds": step_seconds}
        times = {name: {"value": value} for name, value in seconds.items() if value is not None}
        yield _ScoreBlock(number, None, {}, None, list(times), [None] * len(times), times)


def _list_origins(
    requested: Sequence[str], stored: Iterable[str], is_added: bool
) -> tuple[Sequence[str | None], Sequence[str]]:
    """Return (metrics, origin of each): requested ones, then other stored ones; [None] if there is none."""
    others = [metric for metric in stored if metric not in requested]
    origins = ["requested"] * len(requested) + ["added" if is_added else "stored"] * len(others)
    metrics = [*requested, *others]
    return (metrics, origins) if metrics else ([None], ["added" if is_added else "requested"])
