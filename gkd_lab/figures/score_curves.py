"""Scores against lmbda (Fig 8), and logged quantities against the training step."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gkd_lab.config import Cell, Grid
from gkd_lab.figures.panels import Panel, add_divergence_legend, build_panels, create_axes, shorten_metric
from gkd_lab.figures.style import MARKERS, MUTED, apply_style, get_divergence_color
from gkd_lab.statistics.summaries import NO_BETA, summary
from gkd_lab.store import Store
from gkd_lab.tables.loss_labels import divergence_label
from gkd_lab.tables.table import list_wide_axes


def curves(frame: pd.DataFrame, metric: str, task: str | None = None) -> Figure:
    """Draw mean scores against lmbda, a line per divergence, 95 % intervals; start and teacher dashed.

    A panel for each task and combination of varying axes. Points of one lmbda stand side by side so that
    their intervals can be read.
    """
    with apply_style():
        panels = build_panels(frame, metric, task)
        figure, axes = create_axes(len(panels), 6.4 if len(panels) == 1 else 4.4, 3.3)
        summaries = summary(frame, metric)
        for panel, panel_axes in zip(panels, axes, strict=True):
            _draw_curves(panel_axes, panel, summaries, list_wide_axes(frame))
            panel_axes.set_ylabel(shorten_metric(metric))
        add_divergence_legend(figure, axes)
        return figure


def _draw_curves(axes: Axes, panel: Panel, summaries: pd.DataFrame, other_axes: list[str]) -> None:
    """Draw one panel: a line per divergence from the cells' summaries, start and teacher dashed."""
    first = panel.cells.iloc[0]
    cells = summaries[(summaries["role"] == "cell") & (summaries["task"] == first["task"])]
    for axis in other_axes:
        if summaries[axis].nunique(dropna=False) > 1 and not panel.cells[axis].nunique() > 1:
            cells = cells[cells[axis].isna() if pd.isna(first[axis]) else cells[axis] == first[axis]]
    lmbdas = sorted(panel.cells["lmbda"].unique())
    betas = sorted(panel.cells["beta"].unique())
    step = 0.012 * (max(lmbdas) - min(lmbdas) or 1.0)
    for index, beta in enumerate(betas):
        line = cells[(cells["beta"] == beta) & cells["mean"].notna()].sort_values("lmbda")
        if not line.empty:
            offset = (index - (len(betas) - 1) / 2) * step
            _draw_curve(axes, line, offset, beta, MARKERS[index % len(MARKERS)])
    _draw_references(axes, panel)
    axes.set_xticks(lmbdas, [f"{lmbda:g}" for lmbda in lmbdas])
    axes.set_xlabel("λ, share of student-written batches")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(False, axis="x")
    axes.set_title(panel.title, fontweight="bold", pad=10)


def _draw_curve(axes: Axes, line: pd.DataFrame, offset: float, beta: float, marker: str) -> None:
    """Draw one divergence's means and intervals against lmbda, shifted sideways by `offset`."""
    x, y = line["lmbda"] + offset, line["mean"].astype(float)
    color = get_divergence_color(beta)
    axes.plot(x, y, color=color, marker=marker, ms=5, lw=1.6, label=divergence_label(beta))
    low, high = line["low"].astype(float), line["high"].astype(float)
    axes.vlines(x, low, high, color=color, lw=1.2, alpha=0.6)


def _draw_references(axes: Axes, panel: Panel) -> None:
    """Draw SFT student and teacher, where scored, as dashed lines with names at the right end."""
    scores = {"SFT student": panel.start_score, "teacher": panel.teacher_score}
    references = {name: value for name, value in scores.items() if value is not None}
    for name, value in references.items():
        is_upper = value == max(references.values())
        axes.axhline(value, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{name} {value:.1f}", (1, value), (5, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="bottom" if is_upper else "top", color=MUTED, fontsize=8.5,
        )  # fmt: skip


def loss_curves(grid: Grid, store: Store, task: str | None = None, quantity: str = "loss") -> Figure:
    """Draw a logged quantity against the training step, a panel per lmbda, a line per cell.

    Losses are on a log scale; those of different divergences do not compare, their shapes do.
    """
    cells = [cell for cell in grid.cells if task in (None, cell.task)]
    lmbdas = sorted({cell.lmbda for cell in cells})
    with apply_style():
        figure, axes = create_axes(len(lmbdas), 3.1, 2.7, sharey=True)
        for lmbda, panel_axes in zip(lmbdas, axes, strict=True):
            _draw_loss_curves(panel_axes, [cell for cell in cells if cell.lmbda == lmbda], store, quantity)
            panel_axes.set_title(f"λ = {lmbda:g}", fontweight="bold")
            panel_axes.set_xlabel("step")
        if axes:
            axes[0].set_ylabel(quantity.replace("_", " "))
        add_divergence_legend(figure, axes)
        return figure


def _draw_loss_curves(axes: Axes, cells: Sequence[Cell], store: Store, quantity: str) -> None:
    """Draw each cell's history; the quantity `loss` on a log scale if all values are above 0."""
    lowest, highest = np.inf, 0.0
    for cell in sorted(cells, key=lambda cell: NO_BETA if cell.beta is None else cell.beta):
        logged = [row for row in store.get_record(cell).read_history() if row.get(quantity) is not None]
        if logged:
            values = [float(row[quantity]) for row in logged]
            finite = [value for value in values if np.isfinite(value)]
            lowest, highest = min([lowest, *finite]), max([highest, *finite])
            axes.plot(
                [row["step"] for row in logged], values, lw=1.3, alpha=0.9,
                color=get_divergence_color(cell.beta), label=divergence_label(cell.beta, cell.divergence),
            )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if quantity == "loss" and 0 < lowest < highest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
