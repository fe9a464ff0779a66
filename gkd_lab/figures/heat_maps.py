"""Heat maps over lmbda and divergence: of a run (Figs 6, 7), and of a run beside the paper."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from gkd_lab.figures.panels import (
    Panel,
    build_panels,
    create_axes,
    format_metric,
    format_signed,
    group_cells_by_point,
    set_panel_title,
)
from gkd_lab.figures.paper_maps import GridPoint, MapPair
from gkd_lab.figures.style import (
    FAINT,
    GAIN_COLORS,
    INK,
    MISSING,
    PAPER,
    SIGNED_COLORS,
    apply_style,
    choose_text_color,
)
from gkd_lab.statistics.noise import Array
from gkd_lab.store import combine_states
from gkd_lab.tables.divergences import CellDivergence, list_divergences
from gkd_lab.tables.scores import select_scores

MapPoint = tuple[float, CellDivergence]
"""(lmbda, divergence)"""


def heat_map(
    table: pd.DataFrame, metric: str, task: str | None = None, evaluation: str | None = None
) -> Figure:
    """Draw the mean gain over the SFT student at each (lmbda, divergence), a panel per task and axis setting.

    Takes the long table; `metric` and `evaluation` are as in `select_scores`. lmbda 1 is on top. Without a
    score of the SFT student the scores themselves. One panel for each task that has the metric and each
    combination of varying axes. The best is bold; what is not done is hatched. Raises ConfigError for a
    score that the table has not.
    """
    scores = select_scores(table, metric, evaluation, task)
    with apply_style():
        panels = build_panels(scores)
        width = _get_map_width(max(len(list_divergences(panel.cells)) for panel in panels))
        height = 1.45 + 0.5 * max(panel.cells["lmbda"].nunique() for panel in panels)
        figure, axes = create_axes(len(panels), width, height)
        for panel, panel_axes in zip(panels, axes, strict=True):
            _draw_panel(panel_axes, panel, format_metric(scores))
        return figure


def paired_heat_maps(pairs: Sequence[MapPair]) -> Figure:
    """Draw each pair as two panels, the run's map and the paper's: one colour scale, equal squares."""
    with apply_style():
        width = _get_map_width(max(len({beta for _, beta in pair.paper_values}) for pair in pairs))
        figure, axes = create_axes(2 * len(pairs), width, 3.0, columns=2)
        for pair, run_axes, paper_axes in zip(pairs, axes[::2], axes[1::2], strict=True):
            run_values, paper_values = _add_divergences(pair.run_values), _add_divergences(pair.paper_values)
            points = run_values.keys() | paper_values.keys()
            scale = [*run_values.values(), *paper_values.values()]
            quantity = "improvement over the start" if pair.is_gain else "difference from the mean"
            for map_axes, values in ((run_axes, run_values), (paper_axes, paper_values)):
                labels = {point: format_signed(value, 2) for point, value in values.items()}
                _draw_heat_map(map_axes, points, values, labels, scale)
            set_panel_title(run_axes, f"this run: {pair.title}", f"{quantity}, in points")
            set_panel_title(
                paper_axes, f"the paper: Figure {pair.paper_figure}", f"{quantity}, {pair.students}"
            )
        return figure


def _add_divergences(values: Mapping[GridPoint, float]) -> dict[MapPoint, float]:
    """Return the values of a pair, which are all of JSD(beta), by (lmbda, divergence)."""
    return {(lmbda, CellDivergence("jsd", beta)): value for (lmbda, beta), value in values.items()}


def _get_map_width(columns: int) -> float:
    """Return the width in inches of a map with so many columns, at least 4.2."""
    return max(4.2, 1.05 + 0.86 * columns)


def _draw_panel(axes: Axes, panel: Panel, metric: str) -> None:
    """Draw one panel of `heat_map`: mean gains as labels, or the cells' state where none has a score."""
    positions_by_point = {
        (lmbda, divergence): positions for lmbda, divergence, positions in group_cells_by_point(panel.cells)
    }
    scores, states = panel.cells["value"].to_numpy("float64"), panel.cells["status"].tolist()
    gains = scores if panel.start_score is None else scores - panel.cells["start_value"].to_numpy("float64")
    means = {point: _average_scored(gains[positions]) for point, positions in positions_by_point.items()}
    values = {point: mean for point, mean in means.items() if mean is not None}
    decimals = _choose_decimals(values.values())
    labels: dict[MapPoint, str] = {}
    for point, positions in positions_by_point.items():
        done = len(positions) - int(np.isnan(scores[positions]).sum())
        if point not in values:
            labels[point] = combine_states([states[position] for position in positions])
            continue
        value = values[point]
        label = f"{value:.{decimals}f}" if panel.start_score is None else format_signed(value, decimals)
        labels[point] = label if done == len(positions) else f"{label}\n{done} of {len(positions)} seeds"
    _draw_heat_map(axes, positions_by_point, values, labels, list(values.values()))
    set_panel_title(axes, panel.title, f"{metric}, {panel.subtitle}")


def _average_scored(values: Array) -> float | None:
    """Return the mean of the values that are not NaN; None without one."""
    count = len(values) - int(np.isnan(values).sum())
    return float(np.nansum(values) / count) if count else None


def _draw_heat_map(
    axes: Axes,
    points: Collection[MapPoint],
    values: Mapping[MapPoint, float],
    labels: Mapping[MapPoint, str],
    scale: Sequence[float],
) -> None:
    """Draw a square per (lmbda, divergence): coloured by value, the largest bold, hatched without a value.

    Colours span the values of `scale`. `pcolormesh`, not `imshow`: it stays a vector drawing in SVG,
    so that a report's page holds no embedded image.
    """
    lmbdas = sorted({lmbda for lmbda, _ in points})
    divergences = sorted({divergence for _, divergence in points})
    matrix = np.array([[values.get((lmbda, column), np.nan) for column in divergences] for lmbda in lmbdas])
    colormap, norm = _choose_colors(scale)
    largest = max(values.values(), default=None)
    column_edges, row_edges = np.arange(len(divergences) + 1) - 0.5, np.arange(len(lmbdas) + 1) - 0.5
    axes.tick_params(which="both", length=0)  # before there are many ticks to change
    axes.set_axisbelow(False)  # the lines of the paper's colour separate the squares
    axes.grid(False, which="major")
    axes.grid(True, which="minor", color=PAPER, linewidth=2)
    axes.pcolormesh(column_edges, row_edges, np.ma.masked_invalid(matrix), cmap=colormap, norm=norm)
    axes.patch.set(facecolor=MISSING, edgecolor=FAINT, hatch="////", linewidth=0)
    for row, lmbda in enumerate(lmbdas):
        for column, divergence in enumerate(divergences):
            value, label = values.get((lmbda, divergence)), labels.get((lmbda, divergence), "")
            axes.text(
                column,
                row,
                label,
                ha="center",
                va="center",
                color=INK if value is None else choose_text_color(colormap(norm(value))),
                fontsize=8.5 if value is None else 8 if "\n" in label else 10.5,
                fontstyle="italic" if value is None else "normal",
                fontweight="bold" if value is not None and value == largest else "normal",
            ).set_in_layout(False)  # it lies within its square, so that nothing needs to measure it
    axes.set_xticks(range(len(divergences)), [divergence.label for divergence in divergences])
    axes.set_yticks(range(len(lmbdas)), [f"{lmbda:g}" for lmbda in lmbdas])
    axes.set_xticks(column_edges, minor=True)
    axes.set_yticks(row_edges, minor=True)
    axes.set_ylabel("λ", rotation=0, labelpad=10, va="center", fontsize=11)
    axes.spines[:].set_visible(False)


def _choose_colors(values: Sequence[float]) -> tuple[Colormap, Normalize]:
    """Return (colormap, norm) over the values' range; 0 is white where both signs occur."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low < 0 < high:
        end = max(-low, high)
        return SIGNED_COLORS, Normalize(-end, end)
    return GAIN_COLORS, Normalize(low, high) if low < high else Normalize(low - 1, high + 1)


def _choose_decimals(values: Iterable[float]) -> int:
    """Return the decimals of labels: 2 if all |values| are below 2 and one needs them, else 1."""
    numbers = list(values)
    is_small = bool(numbers) and max(map(abs, numbers)) < 2
    return 2 if is_small and any(abs(10 * value - round(10 * value)) > 1e-6 for value in numbers) else 1
