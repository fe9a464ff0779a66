"""Scores against lmbda (Fig 8), and logged quantities against the training step."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gkd_lab.config import Cell, Grid
from gkd_lab.figures.layout import TICK_STEPS, add_divergence_legend, create_axes, set_panel_title
from gkd_lab.figures.panels import (
    LMBDA_LABEL,
    Panel,
    build_panels,
    describe_intervals,
    format_metric,
    group_cells_by_point,
)
from gkd_lab.figures.style import MARKERS, MUTED, PAPER, SMALL_SIZE, apply_style, get_divergence_color
from gkd_lab.statistics.summaries import list_scored_models, summarize_models
from gkd_lab.store import Store
from gkd_lab.tables.divergences import CellDivergence, list_divergences
from gkd_lab.tables.scores import select_scores

_NAME_ROOM = 0.13
"""Share of a panel's height for a name of a reference above or below its line."""
_PERCENTAGE_LIMITS = (-15.0, 115.0)
"""Lowest and highest end of the y axis of a percentage: an interval over few seeds may be far wider."""
_FEW_LOGGED = 5
"""Logged values of a line up to which each is marked: one alone would not be seen."""


def curves(
    table: pd.DataFrame,
    metric: str,
    task: str | None = None,
    evaluation: str | None = None,
    *,
    width: float | None = None,
) -> Figure:
    """Draw mean scores against lmbda, a line per divergence, with intervals; start and teacher dashed.

    Takes the long table; `metric` and `evaluation` are as in `select_scores`. Intervals are at 95 % over
    seeds, of a single seed over its examples. A panel for each task and
    combination of varying axes. Points of one lmbda stand side by side so that their intervals can be read.
    `width` is in inches: None is a column for one panel, else the text of a page. Raises ConfigError for a
    score that the table has not.
    """
    scores = select_scores(table, metric, evaluation, task)
    with apply_style():
        panels = build_panels(scores)
        figure, axes = create_axes(len(panels), 2.2, width=width, stretches=False)
        for panel, panel_axes in zip(panels, axes, strict=True):
            label = format_metric(scores)
            _draw_curves(panel_axes, panel, is_percentage=label.endswith("(%)"))
            panel_axes.set_ylabel(label)
        add_divergence_legend(figure, axes, list_divergences(pd.concat([panel.cells for panel in panels])))
        return figure


def _draw_curves(axes: Axes, panel: Panel, *, is_percentage: bool) -> None:
    """Draw one panel: a line per divergence, start and teacher dashed.

    is_percentage: scores are from 0 to 100; an interval far beyond ends at the edge of the panel.
    """
    models = list_scored_models(panel.cells)
    points = [
        {
            "lmbda": lmbda,
            "divergence": divergence,
            **summarize_models([models[position] for position in positions]),
        }
        for lmbda, divergence, positions in group_cells_by_point(panel.cells)
    ]
    lmbdas = sorted(panel.cells["lmbda"].unique())
    divergences = list_divergences(panel.cells)
    step = 0.012 * (max(lmbdas) - min(lmbdas) or 1.0)
    for index, divergence in enumerate(divergences):
        line = [point for point in points if point["divergence"] == divergence]
        if any(point["n"] for point in line):
            offset = (index - (len(divergences) - 1) / 2) * step
            _draw_curve(axes, pd.DataFrame(line), offset, divergence, MARKERS[index % len(MARKERS)])
    references = {"SFT student": panel.start_score, "teacher": panel.teacher_score}
    scores = {name: value for name, value in references.items() if value is not None}
    for value in scores.values():
        axes.axhline(value, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes.margins(y=_NAME_ROOM)
    if is_percentage:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, _PERCENTAGE_LIMITS[0]), min(high, _PERCENTAGE_LIMITS[1]))
    _name_references(axes, scores, pd.DataFrame(points))
    axes.set_xticks(lmbdas, [f"{lmbda:g}" for lmbda in lmbdas])
    axes.set_xlabel(LMBDA_LABEL)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
    axes.grid(False, axis="x")
    set_panel_title(axes, panel.title, describe_intervals(panel.cells, points))


def _draw_curve(
    axes: Axes, line: pd.DataFrame, offset: float, divergence: CellDivergence, marker: str
) -> None:
    """Draw one divergence's means and intervals against lmbda, shifted sideways by `offset`.

    The line has a gap where a lmbda has no score.
    """
    x, color = line["lmbda"] + offset, get_divergence_color(divergence)
    axes.plot(x, line["mean"].astype(float), color=color, marker=marker, label=divergence.label)
    low, high = line["low"].astype(float), line["high"].astype(float)
    axes.vlines(x, low, high, color=color, lw=1.0, alpha=0.6)


def _name_references(axes: Axes, references: Mapping[str, float], points: pd.DataFrame) -> None:
    """Write name and score of SFT student and teacher above the upper of their lines and below the other.

    A name stands at the right end, or at the left one if points or intervals are in its place at the right
    alone. What is drawn of the cells lies above it. points: Mean and interval by `lmbda`.
    """
    for name, value in references.items():
        is_upper = name == max(references, key=lambda key: references[key])
        height = _NAME_ROOM * (axes.get_ylim()[1] - axes.get_ylim()[0]) * (1 if is_upper else -1)
        place = min(value, value + height), max(value, value + height)
        is_left = _is_taken(points, max, place) and not _is_taken(points, min, place)
        x, shift = (0, 1) if is_left else (1, -1)
        axes.annotate(
            f"{name} {value:.1f}", (x, value), (shift, 2 if is_upper else -2),
            ha="left" if is_left else "right", va="bottom" if is_upper else "top",
            xycoords=("axes fraction", "data"), textcoords="offset points", color=MUTED, fontsize=SMALL_SIZE,
            bbox={"facecolor": PAPER, "alpha": 0.7, "pad": 0.6, "lw": 0}, zorder=1.5,
        )  # fmt: skip


def _is_taken(
    points: pd.DataFrame, choose_end: Callable[[Iterable[float]], float], place: tuple[float, float]
) -> bool:
    """Return whether a mean or interval at the lowest or highest lmbda reaches into (bottom, top)."""
    ends = points[points["lmbda"] == choose_end(points["lmbda"])]
    low = ends[["low", "mean"]].astype(float).min(axis=1)
    high = ends[["high", "mean"]].astype(float).max(axis=1)
    return bool(((low < place[1]) & (high > place[0])).any())


def loss_curves(
    grid: Grid,
    store: Store,
    task: str | None = None,
    quantity: str = "loss",
    *,
    width: float | None = None,
) -> Figure:
    """Draw a logged quantity against the training step, a panel per lmbda, a line per cell.

    Losses are on a log scale; those of different divergences do not compare, their shapes do. `width` is as
    in `curves`.
    """
    cells = [cell for cell in grid.cells if task in (None, cell.task)]
    lmbdas = sorted({cell.lmbda for cell in cells})
    with apply_style():
        figure, axes = create_axes(len(lmbdas), 1.9, panel_width=1.5, width=width, sharey=True)
        for lmbda, panel_axes in zip(lmbdas, axes, strict=True):
            _draw_loss_curves(panel_axes, [cell for cell in cells if cell.lmbda == lmbda], store, quantity)
            members = [cell for cell in cells if cell.lmbda == lmbda]
            set_panel_title(panel_axes, f"λ = {lmbda:g}", _count_cells(members))
            panel_axes.set_xlabel("step")
            if panel_axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
                panel_axes.set_ylabel(quantity.replace("_", " "))
        add_divergence_legend(figure, axes, sorted(set(map(_get_divergence, cells))))
        return figure


def _count_cells(cells: Sequence[Cell]) -> str:
    """Return how many seeds the lines of a panel are of."""
    seeds = len({cell.seed for cell in cells})
    return f"{seeds} seed{'s' if seeds > 1 else ''}, a line each" if seeds else ""


def _get_divergence(cell: Cell) -> CellDivergence:
    """Return the divergence of a cell's first loss term."""
    return CellDivergence(cell.divergence, cell.beta)


def _draw_loss_curves(axes: Axes, cells: Sequence[Cell], store: Store, quantity: str) -> None:
    """Draw each cell's history; the quantity `loss` on a log scale if all values are above 0."""
    lowest, highest = np.inf, 0.0
    for cell in sorted(cells, key=_get_divergence):
        logged = [row for row in store.get_record(cell).read_history() if row.get(quantity) is not None]
        if logged:
            values = [float(row[quantity]) for row in logged]
            finite = [value for value in values if np.isfinite(value)]
            lowest, highest = min([lowest, *finite]), max([highest, *finite])
            axes.plot(
                [row["step"] for row in logged], values, lw=1.1, alpha=0.9,
                marker="o" if len(logged) <= _FEW_LOGGED else "", ms=2.5,
                color=get_divergence_color(_get_divergence(cell)), label=_get_divergence(cell).label,
            )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=TICK_STEPS))
    if quantity == "loss" and 0 < lowest < highest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
