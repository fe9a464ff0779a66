"""Choose and draw the figures that fit a grid, for the report and for `gkd-lab figures`.

A grid of rows has lines, methods and losses have bars, other grids a heat map and its curves; training
losses, the paper's maps, costs and the figures over all tasks stand beside them where their data exist.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.config import Grid
from gkd_lab.figures.cost_figures import TrainingCost, compute_costs, cost_scatter
from gkd_lab.figures.heat_maps import heat_map, paired_heat_maps
from gkd_lab.figures.method_figures import bars, lines
from gkd_lab.figures.paper_maps import MapPair, pair_maps
from gkd_lab.figures.profiles import draw_interquartile_means, draw_profiles
from gkd_lab.figures.score_curves import curves, loss_curves
from gkd_lab.statistics.aggregates import AggregatedScores, aggregate_scores
from gkd_lab.store import Store
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.loss_labels import METHOD_NAMES
from gkd_lab.tables.results import name_evaluations
from gkd_lab.tables.rows import get_primary_metric
from gkd_lab.tables.scores import list_score_names, select_primary_scores, select_scores

ROWS_AXIS = "student.sft.rows"
"""Axis of the rows of a student's SFT, on which it is then distilled."""
MAX_LOSS_CURVES = 200
"""Cells of a task whose training histories are still drawn in one figure."""
_NAMES = {
    "map": "heat-map", "curves": "curves", "rows": "rows", "bars": "bars", "losses": "training-loss",
    "paper": "beside-the-paper", "cost": "cost", "means": "interquartile-means", "profiles": "profiles",
}  # fmt: skip


@dataclass(frozen=True)
class TaskScores:
    """What the figures of one task are drawn from."""

    task: str
    scores: pd.DataFrame
    """Rows of `select_scores`: the first metric of the task's first evaluation."""
    costs: Mapping[str, TrainingCost]
    """Fingerprint of each done cell -> cost of its training."""
    pairs: Sequence[MapPair]
    """Maps of the task beside the paper's; empty where the paper is not shown."""

    @property
    def score_name(self) -> str:
        """Name of the score, `<evaluation>/<metric>`."""
        return list_score_names(self.scores)[0]

    @property
    def has_scores(self) -> bool:
        """Whether some cell has a score."""
        return bool(self.scores.loc[self.scores["role"] == "cell", "value"].notna().any())

    @property
    def bar_axis(self) -> str | None:
        """Axis that tells methods apart instead of lmbda and divergence; None without one."""
        axes = list_axes(self.scores)
        if "method" in axes and set(self.scores["method"].dropna()) <= set(METHOD_NAMES):
            return "method"
        return "objectives" if "objectives" in axes else None


@dataclass(frozen=True)
class GridFigure:
    """A figure of a grid."""

    kind: str
    """`map`, `curves`, `rows`, `bars`, `losses`, `paper`, `cost`, `means` or `profiles`."""
    task: str | None
    """None: over all tasks."""
    figure: Figure
    label: str
    """What it shows, in words."""
    has_data: bool = True
    """Whether it shows a value, and not missing cells alone."""

    @property
    def name(self) -> str:
        """Task and figure, such as `arithmetic-heat-map`."""
        return f"{self.task or 'all-tasks'}-{_NAMES[self.kind]}"


def collect_task_scores(
    grid: Grid, store: Store, table: pd.DataFrame, *, with_paper: bool
) -> list[TaskScores]:
    """Return the scores, costs and paired maps of each task of a grid's long table, in its order.

    with_paper: Whether to pair the maps with the paper's.
    """
    model_scores = load_table_scores(table) if with_paper else None
    parts = []
    for task in table["task"].unique():
        cell = next(cell for cell in grid.cells if cell.task == task)
        evaluation, metric = get_primary_metric(cell)
        name = name_evaluations(cell.evaluations)[evaluation.folder]
        parts.append(
            TaskScores(
                task,
                select_scores(table, metric, name, task),
                compute_costs(grid, store, task),
                pair_maps(model_scores, task) if model_scores else [],
            )
        )
    return parts


def aggregate_tasks(table: pd.DataFrame) -> AggregatedScores | None:
    """Return normalised scores over all tasks, or all settings of one; None below two with scores."""
    aggregated = aggregate_scores(select_primary_scores(table))
    return aggregated if len(aggregated.tasks) >= 2 and aggregated.methods else None


def draw_grid_figures(
    grid: Grid,
    store: Store,
    tasks: Sequence[TaskScores],
    aggregated: AggregatedScores | None,
    width: float | None = None,
) -> Iterator[GridFigure]:
    """Draw and yield every figure that fits a grid, those over all tasks first.

    Maps are drawn also where no cell is done. tasks: As `collect_task_scores` returns them. aggregated: As
    `aggregate_tasks` returns it. width: Inches of each figure; None: a column for one panel, else the text of
    a page.
    """
    if aggregated is not None:
        yield from _draw_aggregate_figures(aggregated, width)
    for task in tasks:
        yield from _draw_score_figures(task, width)
        yield from _draw_losses(grid, store, task.task, width)
        yield from _draw_paper_maps(task, width)
        yield from _draw_costs(task, width)


def _draw_aggregate_figures(aggregated: AggregatedScores, width: float | None) -> Iterator[GridFigure]:
    """Draw the interquartile means and the performance profiles over all tasks."""
    label = "normalised scores over all tasks, by method"
    yield GridFigure(
        "means", None, draw_interquartile_means(aggregated, width=width), f"Interquartile means of {label}"
    )
    yield GridFigure(
        "profiles", None, draw_profiles(aggregated, width=width), f"Performance profiles: {label}"
    )


def _draw_score_figures(task: TaskScores, width: float | None) -> Iterator[GridFigure]:
    """Draw the figures of a task's scores: lines over rows, bars of methods, or a map and its curves."""
    scores, metric, bar_axis = task.scores, str(task.scores["metric"].iloc[0]), task.bar_axis
    subject = f"{task.score_name} on {task.task}"
    cells = scores[scores["role"] == "cell"]
    if _is_grid_of_rows(cells) and task.has_scores:
        label = f"{subject} against the rows of SFT and distillation, one line for each lambda"
        figure = lines(scores, metric, x_axis=ROWS_AXIS, line_axis="lmbda", width=width)
        yield GridFigure("rows", task.task, figure, label)
    elif bar_axis is None:
        label = f"Heat map of {subject} over lambda and divergence"
        yield GridFigure("map", task.task, heat_map(scores, metric, width=width), label, task.has_scores)
        if task.has_scores:
            label = f"{subject} against lambda, one line for each divergence"
            yield GridFigure("curves", task.task, curves(scores, metric, width=width), label)
    elif task.has_scores:
        is_over_lmbda = cells["lmbda"].nunique() > 1 and bar_axis == "objectives"
        figure = (
            lines(scores, metric, x_axis="lmbda", line_axis=bar_axis, width=width)
            if is_over_lmbda
            else bars(scores, metric, bar_axis=bar_axis, width=width)
        )
        yield GridFigure("bars", task.task, figure, f"{subject} by {bar_axis}")


def _is_grid_of_rows(cells: pd.DataFrame) -> bool:
    """Return whether cells differ in rows, lmbda and seed alone, so that lines over the rows show them."""
    is_one_divergence = len(cells[["divergence", "beta"]].drop_duplicates()) == 1
    return list_axes(cells) == [ROWS_AXIS] and is_one_divergence and cells[ROWS_AXIS].nunique() > 1


def _draw_losses(grid: Grid, store: Store, task: str, width: float | None) -> Iterator[GridFigure]:
    """Draw the training losses of a task, where some are logged and not too many."""
    cells = [cell for cell in grid.cells if cell.task == task]
    count = sum(store.get_record(cell).metrics_file.exists() for cell in cells)
    if 0 < count <= MAX_LOSS_CURVES:
        label = f"Training loss on {task} against the step, for each lambda"
        yield GridFigure("losses", task, loss_curves(grid, store, task, width=width), label)


def _draw_paper_maps(task: TaskScores, width: float | None) -> Iterator[GridFigure]:
    """Draw a task's maps beside the paper's, where there is a pair."""
    if task.pairs:
        label = f"Heat maps of {task.task}: this run beside the paper"
        yield GridFigure("paper", task.task, paired_heat_maps(task.pairs, width=width), label)


def _draw_costs(task: TaskScores, width: float | None) -> Iterator[GridFigure]:
    """Draw a task's scores against the costs of training, where a cell is done and a cost varies."""
    figure = cost_scatter(task.scores, task.costs, width=width) if task.costs else None
    if figure is not None:
        label = f"{task.score_name} on {task.task} against the cost of training"
        yield GridFigure("cost", task.task, figure, label)
