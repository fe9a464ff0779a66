"""Panels of a figure, one for each task and each value of a further axis: layout, titles, legends."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gkd_lab.figures.style import MUTED
from gkd_lab.statistics.summaries import NO_BETA, expand_collapsed_cells, summary
from gkd_lab.tables.loss_labels import divergence_label, format_axis_setting
from gkd_lab.tables.table import list_wide_axes

MAX_COLUMNS = 3
TITLE_CHARACTERS = 46
"""Characters of a title's line, as wide as a panel."""


@dataclass(frozen=True)
class Panel:
    """The cells of one panel with the scores of their SFT student and their teacher."""

    title: str
    cells: pd.DataFrame
    start_score: float | None
    teacher_score: float | None

    @property
    def subtitle(self) -> str:
        """Two lines: the SFT student's score as baseline, or that it is missing; the teacher's score."""
        teacher = "missing" if self.teacher_score is None else f"{self.teacher_score:.1f}"
        if self.start_score is None:
            return f"as measured: the SFT student is missing\nteacher {teacher}"
        return f"improvement over the SFT student ({self.start_score:.1f})\nteacher {teacher}"


def build_panels(frame: pd.DataFrame, metric: str, task: str | None) -> list[Panel]:
    """Return a panel per task and combination of varying axes. `task` None: all with the metric.

    Panels are in the table's order. Raises ValueError for a metric that is no column.
    """
    if metric not in frame.columns:
        scores = [name for name in frame.columns if "/" in name and not name.endswith((".low", ".high"))]
        raise ValueError(f"no column {metric!r} in the table; scores are: {', '.join(scores)}")
    cells = expand_collapsed_cells(frame)
    measured = [name for name, group in frame.groupby("task") if group[metric].notna().any()]
    tasks = [task] if task is not None else measured or list(cells["task"].unique())
    cells = cells[cells["task"].isin(tasks)]
    varying = [axis for axis in list_wide_axes(frame) if cells[axis].nunique(dropna=False) > 1]
    return [
        Panel(
            _format_title(dict(zip(["task", *varying], values, strict=True))),
            group,
            _find_reference_score(frame, metric, "start", group),
            _find_reference_score(frame, metric, "teacher", group),
        )
        for values, group in cells.groupby(["task", *varying], dropna=False, sort=False)
    ]


def build_summary_panels(
    frame: pd.DataFrame, metric: str, excluded_axes: Sequence[str]
) -> list[tuple[str, pd.DataFrame]]:
    """Return (title, cells' summary rows) per task and combination of varying axes not excluded.

    A collapsed cell stands once, under the first of its names. Raises ValueError where nothing has a score.
    """
    summaries = summary(frame.assign(stands_for=None), metric)
    cells = summaries[(summaries["role"] == "cell") & summaries["mean"].notna()]
    if cells.empty:
        raise ValueError(f"no cell has a score in {metric!r} yet")
    axes = [axis for axis in list_wide_axes(frame) if axis not in excluded_axes]
    varying = [axis for axis in axes if cells[axis].nunique(dropna=False) > 1]
    panels = []
    for (task, *values), group in cells.groupby(["task", *varying], sort=False, dropna=False):
        settings = [f"{axis} {value}" for axis, value in zip(varying, values, strict=True)]
        panels.append((", ".join([str(task), *settings]), group))
    return panels


def create_axes(
    count: int, width: float, height: float, sharey: bool = False, columns: int = MAX_COLUMNS
) -> tuple[Figure, list[Axes]]:
    """Return (figure, list of `count` axes), each `width` x `height` inches, at most `columns` a row.

    Left over places of the last row are blank.
    """
    columns = min(count, columns) or 1
    rows = math.ceil(count / columns) or 1
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.08)  # type: ignore[union-attr,call-arg]
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def set_panel_title(axes: Axes, title: str, subtitle: str) -> None:
    """Write a bold title and a muted two-line subtitle above a panel; it may be wider than the panel."""
    axes.set_title(title, pad=34, fontweight="bold")
    axes.annotate(
        subtitle, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
        color=MUTED, fontsize=9, va="bottom", linespacing=1.3, annotation_clip=False,
    ).set_in_layout(False)  # fmt: skip


def add_divergence_legend(figure: Figure, axes: list[Axes]) -> None:
    """Add one legend for all panels, forward KL first; none where nothing is drawn."""
    handles = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    if handles:
        labels = sorted(map(str, handles), key=_get_legend_order)
        figure.legend([handles[label] for label in labels], labels, loc="outside right center")


def add_side_legend(figure: Figure, axes: Sequence[Axes], extra_handles: Sequence[Line2D] = ()) -> None:
    """Add one legend right of the panels, one entry per label, and widen the figure by it."""
    drawn = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    handles = [*drawn.values(), *extra_handles]
    names = [str(handle.get_label()) for handle in handles]
    legend = figure.legend(handles, names, loc="outside right center")
    figure.set_figwidth(figure.get_figwidth() + legend.get_window_extent().width / figure.dpi)


def _get_legend_order(label: str) -> float:
    """Return the beta of a `divergence_label` as sort key; `NO_BETA`, the last, for other labels."""
    betas = {divergence_label(beta): beta for beta in (0.0, 1.0)}
    is_jsd = label.startswith("JSD(")
    return float(label[4:-1]) if is_jsd else betas.get(label, NO_BETA)


def group_cells_by_point(cells: pd.DataFrame) -> Iterator[tuple[float, float, pd.DataFrame]]:
    """Yield (lmbda, beta, the cells there: one per seed), sorted by lmbda, then beta."""
    for _, group in cells.groupby(["lmbda", "beta"], sort=True):
        yield float(group["lmbda"].iloc[0]), float(group["beta"].iloc[0]), group


def _format_title(values: dict[str, Any]) -> str:
    """Format task and axis values, wrapped to a panel's width; pops `task` from `values`."""
    task = str(values.pop("task"))
    title = ", ".join([task, *(format_axis_setting(axis, value) for axis, value in values.items())])
    return textwrap.fill(title, TITLE_CHARACTERS)


def _find_reference_score(frame: pd.DataFrame, metric: str, role: str, cells: pd.DataFrame) -> float | None:
    """Return the score of these cells' start or teacher; None unless exactly one is scored."""
    references = frame[(frame["role"] == role) & frame["cell"].isin(cells[f"{role}_cell"].unique())]
    scores = references[metric].dropna()
    return float(scores.iloc[0]) if len(scores) == 1 else None


def shorten_metric(column: str) -> str:
    """Return the metric of a score column for an axis label: `greedy/exact_match` -> `exact match`."""
    return column.rsplit("/", 1)[-1].replace("_", " ")


def format_signed(value: float, decimals: int = 1) -> str:
    """Format a number with + or a true minus sign and so many decimals."""
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")
