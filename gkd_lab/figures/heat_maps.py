"""The paper's figures from the table: heat maps over lmbda and divergence (Figs 6, 7), curves over
lmbda (Fig 8), and how training went.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gkd_lab.config import Cell, Grid
from gkd_lab.figures.panels import (
    Panel,
    add_divergence_legend,
    build_panels,
    create_axes,
    group_cells_by_point,
    set_panel_title,
)
from gkd_lab.figures.style import (
    FAINT,
    GAIN_COLORS,
    INK,
    MARKERS,
    MISSING,
    MUTED,
    PAPER,
    SIGNED_COLORS,
    apply_style,
    choose_text_color,
    get_divergence_color,
)
from gkd_lab.statistics.summaries import NO_BETA, summary
from gkd_lab.store import Store, combine_states
from gkd_lab.tables.loss_labels import divergence_label
from gkd_lab.tables.table import list_axes

Color = tuple[float, float, float, float]


def heat_map(frame: pd.DataFrame, metric: str, task: str | None = None) -> Figure:
    """Improvement over the SFT student for each lmbda (1 on top) and divergence, mean over seeds.

    Without a score of the SFT student the scores themselves. One panel for each task that has the
    metric and each value of a further axis. The best is bold; what is not done is hatched.
    """
    with apply_style():
        found = build_panels(frame, metric, task)
        width = max(4.2, 1.05 + 0.86 * max(panel.cells["beta"].nunique() for panel in found))
        height = 1.45 + 0.5 * max(panel.cells["lmbda"].nunique() for panel in found)
        figure, axes = create_axes(len(found), width, height)
        for panel, place in zip(found, axes, strict=True):
            _draw_heat_map(place, panel, metric)
        return figure


def _draw_heat_map(axes: Axes, panel: Panel, metric: str) -> None:
    lmbdas = sorted(panel.cells["lmbda"].unique())
    betas = sorted(panel.cells["beta"].unique())
    gains = {
        (lmbda, beta): group[metric].mean() - (panel.start_score or 0.0)
        for lmbda, beta, group in group_cells_by_point(panel.cells)
        if group[metric].notna().any()
    }
    decimals = _choose_decimals(gains.values())
    for lmbda, beta, group in group_cells_by_point(panel.cells):
        square = (betas.index(beta), lmbdas.index(lmbda))
        gain = gains.get((lmbda, beta))
        if gain is None:
            _draw_void(axes, square, combine_states(list(group["status"])))
        else:
            text = _format_signed(gain, decimals) if panel.start_score is not None else f"{gain:.{decimals}f}"
            done = int(group[metric].notna().sum())
            note = "" if done == len(group) else f"\n{done} of {len(group)} seeds"
            color = _choose_color(gain, list(gains.values()))
            _draw_square(axes, square, text + note, color, bold=gain == max(gains.values()))
    _frame_map(axes, [f"{lmbda:g}" for lmbda in lmbdas], [divergence_label(b) for b in betas])
    set_panel_title(axes, panel.title, f"{_shorten_metric(metric)}, {panel.subtitle}")


def _draw_square(axes: Axes, square: tuple[int, int], text: str, color: Color, bold: bool) -> None:
    corner = (square[0] - 0.5, square[1] - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fc=color, ec=PAPER, lw=2))
    axes.text(
        *square, text, ha="center", va="center", color=choose_text_color(color),
        fontweight="bold" if bold else "normal", fontsize=8 if "\n" in text else 10.5,
    )  # fmt: skip


def _draw_void(axes: Axes, square: tuple[int, int], state: str) -> None:
    corner = (square[0] - 0.5, square[1] - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fc=MISSING, ec=FAINT, hatch="////", lw=0))
    axes.add_patch(Rectangle(corner, 1, 1, fc="none", ec=PAPER, lw=2))
    axes.text(*square, state, ha="center", va="center", color=INK, fontsize=8.5, style="italic")


def _choose_color(value: float, values: Sequence[float]) -> Color:
    """Pale to dark blue over the range; where signs differ, 0 is white and losses are orange."""
    low, high = min(values), max(values)
    if low < 0 < high:
        end = max(-low, high)
        return SIGNED_COLORS(float(Normalize(-end, end)(value)))
    return GAIN_COLORS(float(Normalize(low, high)(value)) if low < high else 0.5)


def _frame_map(axes: Axes, rows: list[str], columns: list[str]) -> None:
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel("λ", rotation=0, labelpad=10, va="center", fontsize=11)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def curves(frame: pd.DataFrame, metric: str, task: str | None = None) -> Figure:
    """Score against lmbda, a line for each divergence, 95 % intervals; start and teacher dashed.

    Points of one lmbda stand side by side so that their intervals can be read.
    """
    with apply_style():
        found = build_panels(frame, metric, task)
        figure, axes = create_axes(len(found), 6.4 if len(found) == 1 else 4.4, 3.3)
        described = summary(frame, metric)
        for panel, place in zip(found, axes, strict=True):
            _draw_curves(place, panel, described, list_axes(frame))
            place.set_ylabel(_shorten_metric(metric))
        add_divergence_legend(figure, axes)
        return figure


def _draw_curves(axes: Axes, panel: Panel, described: pd.DataFrame, other_axes: list[str]) -> None:
    first = panel.cells.iloc[0]
    here = described[(described["role"] == "cell") & (described["task"] == first["task"])]
    for axis in other_axes:
        if described[axis].nunique(dropna=False) > 1 and not panel.cells[axis].nunique() > 1:
            here = here[here[axis].isna() if pd.isna(first[axis]) else here[axis] == first[axis]]
    lmbdas = sorted(panel.cells["lmbda"].unique())
    betas = sorted(panel.cells["beta"].unique())
    step = 0.012 * (max(lmbdas) - min(lmbdas) or 1.0)
    for index, beta in enumerate(betas):
        line = here[(here["beta"] == beta) & here["mean"].notna()].sort_values("lmbda")
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
    x, y = line["lmbda"] + offset, line["mean"].astype(float)
    color = get_divergence_color(beta)
    axes.plot(x, y, color=color, marker=marker, ms=5, lw=1.6, label=divergence_label(beta))
    low, high = line["low"].astype(float), line["high"].astype(float)
    axes.vlines(x, low, high, color=color, lw=1.2, alpha=0.6)


def _draw_references(axes: Axes, panel: Panel) -> None:
    """Dashed lines, named at their right ends; the upper name above its line, the lower below."""
    known = {"SFT student": panel.start_score, "teacher": panel.teacher_score}
    there = {name: value for name, value in known.items() if value is not None}
    for name, value in there.items():
        above = value == max(there.values())
        axes.axhline(value, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{name} {value:.1f}", (1, value), (5, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="bottom" if above else "top", color=MUTED, fontsize=8.5,
        )  # fmt: skip


def loss_curves(grid: Grid, store: Store, task: str | None = None, quantity: str = "loss") -> Figure:
    """How training went: a logged quantity against the step, a panel for each lmbda, a line a cell.

    Losses are on a log scale; those of different divergences do not compare, their shapes do.
    """
    chosen = [cell for cell in grid.cells if task in (None, cell.task)]
    lmbdas = sorted({cell.lmbda for cell in chosen})
    with apply_style():
        figure, axes = create_axes(len(lmbdas), 3.1, 2.7, sharey=True)
        for lmbda, place in zip(lmbdas, axes, strict=True):
            _draw_loss_curves(place, [c for c in chosen if c.lmbda == lmbda], store, quantity)
            place.set_title(f"λ = {lmbda:g}", fontweight="bold")
            place.set_xlabel("step")
        if axes:
            axes[0].set_ylabel(quantity.replace("_", " "))
        add_divergence_legend(figure, axes)
        return figure


def _draw_loss_curves(axes: Axes, cells: Sequence[Cell], store: Store, quantity: str) -> None:
    lowest, highest = np.inf, 0.0
    for cell in sorted(cells, key=lambda cell: NO_BETA if cell.beta is None else cell.beta):
        logged = [row for row in store.get_record(cell).read_history() if row.get(quantity) is not None]
        if logged:
            values = [float(row[quantity]) for row in logged]
            finite = [value for value in values if np.isfinite(value)]
            lowest, highest = min([lowest, *finite]), max([highest, *finite])
            axes.plot(
                [row["step"] for row in logged], values, lw=1.3, alpha=0.9,
                color=get_divergence_color(cell.beta), label=divergence_label(cell.beta),
            )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if quantity == "loss" and 0 < lowest < highest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _choose_decimals(gains: Iterable[float]) -> int:
    """Two where one would make most squares alike, as in Figure 6, and the numbers have two to show."""
    known = list(gains)
    small = bool(known) and max(map(abs, known)) < 2
    return 2 if small and any(abs(10 * gain - round(10 * gain)) > 1e-6 for gain in known) else 1


def _format_signed(value: float, decimals: int = 1) -> str:
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _shorten_metric(metric: str) -> str:
    return metric.rsplit("/", 1)[-1].replace("_", " ")
