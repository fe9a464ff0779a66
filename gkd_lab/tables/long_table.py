"""Long results table: a row per model, evaluation and metric, built by columns.

A missing score is a row with NaN. Training times are metrics of rows without an evaluation.
"""

from collections.abc import Iterator, Sequence
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
    read_step_seconds,
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
    "evaluation_status", "origin", "lm_eval", "task_hash",
)  # fmt: skip
_TYPES = {
    "str": (
        "cell", "role", "scale", "task", "student", "teacher", "divergence", "evaluation", "decoding",
        "split", "metric", "text", "anchor", "start_cell", "teacher_cell", "status", "error",
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
_EVALUATION_SETTINGS = ("decoding", "temperature", "split")
_NO_SCORE: dict[str, Any] = {}
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
      `gkd-lab evaluate`; version and task hash of an lm-eval score.

    `train_seconds` and `step_seconds` (of cells that trained alone and unbroken) are metrics of rows
    without an evaluation. `attrs["axes"]` names the declared axes of the wide form.
    """
    models = list_models(grid, store)
    results = [read_results(model.record, model.evaluations) for model in models]
    scores = _build_score_rows(models, results)
    models_of_scores = _build_model_rows(grid, models, results).take(scores["model"].to_numpy())
    frame = pd.concat([models_of_scores.reset_index(drop=True), scores], axis="columns")
    frame = frame[_list_columns(grid)].astype(_list_types(grid))
    frame.attrs["axes"] = [AXIS_COLUMNS.get(axis, axis) for axis in list_extra_axes(grid)]
    return frame


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


def _list_columns(grid: Grid) -> list[str]:
    """Return the columns of a grid's long table, in order."""
    axes = _list_other_axes(grid)
    facts = [name for name in FACT_COLUMNS if name not in axes]
    axis_columns = [AXIS_COLUMNS.get(axis, axis) for axis in axes]
    return [*LEADING_COLUMNS, *axis_columns, *SCORE_COLUMNS, *facts, *TRAILING_COLUMNS]


def _list_types(grid: Grid) -> dict[str, str]:
    """Return the types of a grid's columns; an axis beside the fixed ones has that of its values."""
    axes = _list_other_axes(grid)
    return {name: COLUMN_TYPES[name] for name in _list_columns(grid) if name in COLUMN_TYPES.keys() - axes}


def _list_other_axes(grid: Grid) -> list[str]:
    """Return the declared axes that have no fixed column."""
    return [axis for axis in list_extra_axes(grid) if axis not in _FIXED_AXES]


# ---- columns of models ----


def _build_model_rows(
    grid: Grid, models: Sequence[TableModel], results: Sequence[ModelResults]
) -> pd.DataFrame:
    """Return a frame with a row per model: settings, axes, facts, links, status and error."""
    return pd.DataFrame(
        {
            "cell": [model.fingerprint for model in models],
            "role": [model.role for model in models],
            "scale": grid.scale,
            "task": [model.cells[0].task for model in models],
            "student": [_get_model_name(grid, model, "student") for model in models],
            "teacher": [_get_model_name(grid, model, "teacher") for model in models],
            **_build_cell_columns(grid, models),
            **{
                AXIS_COLUMNS.get(axis, axis): convert_integers(
                    [find_shared_label(model, axis) for model in models]
                )
                for axis in _list_other_axes(grid)
            },
            "status": [result.status for result in results],
            "error": [result.error for result in results],
        }
    )


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


def _build_cell_columns(grid: Grid, models: Sequence[TableModel]) -> dict[str, list[Any]]:
    """Return columns that only cells have, with None for reference models."""
    names = ("seed", "lmbda", "divergence", "beta", *FACT_COLUMNS, "start_cell", "teacher_cell", "stands_for")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for model in models:
        values = dict.fromkeys(names)
        if model.role == "cell":
            values = _read_cell_values(grid, model.cells[0])
        elif "divergence" in grid.axes:
            values["divergence"] = find_shared_label(model, "divergence")
        for name in names:
            columns[name].append(values[name])
    return columns


def _read_cell_values(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Return a cell's settings, facts, links to its reference models and grid points."""
    points = grid.stands_for.get(cell.full_fingerprint)
    return {
        "seed": cell.seed,
        "lmbda": cell.lmbda,
        "divergence": cell.divergence,
        "beta": cell.beta,
        **read_cell_facts(cell),
        "start_cell": cell.training.start.fingerprint,
        "teacher_cell": cell.training.teacher.fingerprint,
        "stands_for": None
        if points is None
        else [{AXIS_COLUMNS.get(axis, axis): value for axis, value in point.items()} for point in points],
    }


# ---- rows of scores ----


class _ScoreBlock(NamedTuple):
    """Rows of one evaluation of a model, or of its training times."""

    model: int
    evaluation: str | None
    """Name in columns; None for training times."""
    settings: AnyEvaluation | None
    state: State | None
    metrics: Sequence[str | None]
    """A single None for an evaluation without a requested or stored score."""
    origins: Sequence[str | None]
    scores: Scores


def _build_score_rows(models: Sequence[TableModel], results: Sequence[ModelResults]) -> pd.DataFrame:
    """Return a frame with a row per score; its column `model` is the number of the model."""
    blocks = [
        block
        for number, (model, result) in enumerate(zip(models, results, strict=True))
        for block in _list_blocks(number, model, result)
    ]
    settings = [_describe_evaluation(block.settings) for block in blocks]
    per_block = pd.DataFrame(
        {
            "model": [block.model for block in blocks],
            "evaluation": [block.evaluation for block in blocks],
            **{name: [values[name] for values in settings] for name in _EVALUATION_SETTINGS},
            "evaluation_status": [block.state for block in blocks],
        }
    )
    counts = [len(block.metrics) for block in blocks]
    scores = [block.scores.get(metric or "", _NO_SCORE) for block in blocks for metric in block.metrics]
    numbers = ("value", "low", "high", "n")
    columns = {name: np.array([score.get(name) for score in scores], dtype="float64") for name in numbers}
    rows = per_block.take(np.repeat(np.arange(len(blocks)), counts)).reset_index(drop=True)
    other_columns: dict[str, Any] = {
        "metric": [metric for block in blocks for metric in block.metrics],
        "origin": [origin for block in blocks for origin in block.origins],
        "n_examples": pd.array(columns.pop("n"), dtype="Int64"),
        **{name: [score.get(name) for score in scores] for name in ("lm_eval", "task_hash")},
    }
    return rows.assign(**columns, **other_columns)


def _describe_evaluation(evaluation: AnyEvaluation | None) -> dict[str, Any]:
    """Return decoding, temperature and split; None each for an lm-eval task and for training times."""
    is_decoding = isinstance(evaluation, Evaluation)
    return {name: getattr(evaluation, name) if is_decoding else None for name in _EVALUATION_SETTINGS}


def _list_blocks(number: int, model: TableModel, result: ModelResults) -> Iterator[_ScoreBlock]:
    """Yield a block per evaluation, then that of a cell's training times if any was recorded."""
    for part in result.evaluations:
        is_first = part is result.evaluations[0]
        requested = () if part.is_added else list_requested_metrics(part.evaluation, is_first)
        others = [metric for metric in part.scores if metric not in requested]
        origins = ["requested"] * len(requested) + ["added" if part.is_added else "stored"] * len(others)
        metrics: Sequence[str | None] = [*requested, *others]
        if not metrics:
            metrics, origins = [None], ["added" if part.is_added else "requested"]
        yield _ScoreBlock(number, part.name, part.evaluation, part.state, metrics, origins, part.scores)
    if model.role == "cell" and result.training == "done":
        step_seconds = read_step_seconds(model.record, model.cells[0].training.steps)
        seconds = {"train_seconds": result.train_seconds, "step_seconds": step_seconds}
        times = {name: {"value": value} for name, value in seconds.items() if value is not None}
        yield _ScoreBlock(number, None, None, None, list(times), [None] * len(times), times)
