"""Heat maps over lmbda and divergence: of a run (Figs 6, 7), and of a run beside the paper."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, FuncNorm, Normalize
from matplotlib.figure import Figure

from gkd_lab.figures.layout import ColorBar, add_color_bars, create_axes, set_panel_title
from gkd_lab.figures.panels import (
    Panel,
    build_panels,
    format_gain,
    format_metric,
    format_seeds,
    format_signed,
    group_cells_by_point,
    is_of_paper,
)
from gkd_lab.figures.paper_maps import GridPoint, MapPair
from gkd_lab.figures.style import (
    FAINT,
    GAIN_COLORS,
    INK,
    MISSING,
    PAPER,
    SCORE_COLORS,
    SMALL_SIZE,
    apply_style,
    choose_text_color,
)
from gkd_lab.statistics.noise import Array
from gkd_lab.statistics.summaries import NO_INTERVAL, list_scored_models, summarize_models
from gkd_lab.store import combine_states
from gkd_lab.tables.divergences import CellDivergence
from gkd_lab.tables.scores import select_scores

MapPoint = tuple[float, CellDivergence]
"""(lmbda, divergence)"""
Colors = tuple[Colormap, Normalize]

SQUARE_ROOT_RATIO = 4.0
"""Ratio of the largest values of two panels above which their common colour scale is of square roots."""
_VALUE_SIZE, _MIN_VALUE_SIZE = 7.5, 5.0
_LABELS_WIDTH = 0.45
"""Inches left of a map."""


@dataclass(frozen=True)
class PanelMap:
    """The squares of one panel of `heat_map`."""

    points: Collection[MapPoint]
    values: Mapping[MapPoint, float]
    labels: Mapping[MapPoint, str]
    is_gain: bool
    """Gains over the SFT student; else scores, as that is missing."""
    note: str
    """Seeds and intervals."""


def heat_map(
    table: pd.DataFrame,
    metric: str,
    task: str | None = None,
    evaluation: str | None = None,
    *,
    width: float | None = None,
) -> Figure:
    """Draw the mean gain over the SFT student at each (lmbda, divergence), a panel per task and axis setting.

    Takes the long table; `metric` and `evaluation` are as in `select_scores`. lmbda 1 is on top. Without a
    score of the SFT student the scores themselves. One panel for each task that has the metric and each
    combination of varying axes. The best is bold; what is not done is hatched. All panels share one colour
    scale: around 0 for gains, of square roots where one panel's would fade beside another's. `width` is in
    inches: None is a column for one panel, else the text of a page. Raises ConfigError for a score that the
    table has not.
    """
    scores = select_scores(table, metric, evaluation, task)
    with apply_style():
        panels = build_panels(scores)
        maps = [_build_map(panel) for panel in panels]
        height = _get_map_height(max(panel.cells["lmbda"].nunique() for panel in panels))
        panel_width = max(_get_map_width(squares.points) for squares in maps)
        figure, axes = create_axes(len(maps), height, panel_width=panel_width, width=width, has_bar=True)
        bars = []
        for is_gain in (True, False):
            members = [number for number, each in enumerate(maps) if each.is_gain == is_gain]
            colors = choose_colors([list(maps[number].values.values()) for number in members], is_gain)
            for number in members:
                squares = maps[number]
                _draw_heat_map(axes[number], squares.points, squares.values, squares.labels, colors)
                set_panel_title(axes[number], panels[number].title, _join_lines(panels[number], squares))
            label = format_gain(str(scores["metric"].iloc[0])) if is_gain else format_metric(scores)
            bars.append(_build_bar(colors, label, [maps[number].values for number in members]))
        add_color_bars(figure, [bar for bar in bars if bar.values])
        return figure


def paired_heat_maps(pairs: Sequence[MapPair], *, width: float | None = None) -> Figure:
    """Draw each pair as two panels, the run's map and the paper's: one colour scale, equal squares.

    Values are gains or differences from the mean, around 0; `width` is as in `heat_map`.
    """
    with apply_style():
        maps = [values for pair in pairs for values in (pair.run_values, pair.paper_values)]
        points = {point: None for values in maps for point in _add_divergences(values)}
        rows = max(len({lmbda for lmbda, _ in values}) for values in maps)
        figure, axes = create_axes(
            len(maps),
            _get_map_height(rows),
            panel_width=_get_map_width(points),
            width=width,
            columns=2,
            has_bar=True,
        )
        colors = choose_colors([list(values.values()) for values in maps], is_gain=True)
        for pair, run_axes, paper_axes in zip(pairs, axes[::2], axes[1::2], strict=True):
            run_values, paper_values = _add_divergences(pair.run_values), _add_divergences(pair.paper_values)
            quantity = "gain over the SFT student" if pair.is_gain else "difference from the mean"
            for map_axes, values in ((run_axes, run_values), (paper_axes, paper_values)):
                labels = {point: format_signed(value, 2) for point, value in values.items()}
                _draw_heat_map(map_axes, run_values.keys() | paper_values.keys(), values, labels, colors)
            set_panel_title(run_axes, f"this run: {pair.title}", quantity)
            set_panel_title(
                paper_axes, f"the paper: Figure {pair.paper_figure}", f"{quantity}, {pair.students}"
            )
        is_gain = {pair.is_gain for pair in pairs}
        label = "gain" if is_gain == {True} else "difference" if is_gain == {False} else "gain or difference"
        add_color_bars(figure, [_build_bar(colors, f"{label} (points)", maps)])
        return figure


def _get_map_width(points: Iterable[MapPoint]) -> float:
    """Return the inches that a map needs: values, and the longest word below a column, of small type."""
    labels = {divergence.label for _, divergence in points}
    longest = max((len(word) for label in labels for word in label.split()), default=0)
    return _LABELS_WIDTH + max(0.43, 0.053 * longest) * max(len(labels), 2)


def _get_map_height(rows: int) -> float:
    """Return the inches of a map with so many rows, titles and notes."""
    return 1.25 + 0.27 * rows


def _add_divergences(values: Mapping[GridPoint, float]) -> dict[MapPoint, float]:
    """Return the values of a pair, which are all of JSD(beta), by (lmbda, divergence)."""
    return {(lmbda, CellDivergence("jsd", beta)): value for (lmbda, beta), value in values.items()}


def _build_map(panel: Panel) -> PanelMap:
    """Build the squares of a panel: mean gains as labels, or the cells' state where none has a score."""
    positions_by_point = {
        (lmbda, divergence): positions for lmbda, divergence, positions in group_cells_by_point(panel.cells)
    }
    is_gain = panel.start_score is not None
    scores, states = panel.cells["value"].to_numpy("float64"), panel.cells["status"].tolist()
    gains = scores - panel.cells["start_value"].to_numpy("float64") if is_gain else scores
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
        label = format_signed(value, decimals) if is_gain else f"{value:.{decimals}f}"
        labels[point] = label if done == len(positions) else f"{label}\n{done} of {len(positions)}"
    shifted = panel.cells.assign(value=gains)
    models = list_scored_models(shifted.assign(**{
        end: panel.cells[end].astype("float64") - (panel.cells["start_value"] if is_gain else 0.0)
        for end in ("low", "high")
    }))  # fmt: skip
    summaries = [
        summarize_models([models[n] for n in positions]) for positions in positions_by_point.values()
    ]
    note = "as printed in the paper" if is_of_paper(panel.cells) else _describe_intervals(summaries)
    return PanelMap(positions_by_point, values, labels, is_gain, note)


def _describe_intervals(summaries: Sequence[Mapping[Any, Any]]) -> str:
    """Format the number of seeds, and the half widths of the 95 % intervals and what they are over."""
    scored = [row for row in summaries if row["n"]]
    if not scored:
        return ""
    intervals = [row for row in scored if row["interval"] != NO_INTERVAL]
    if not intervals:
        return f"{format_seeds(scored)}, no intervals"
    halves = [(row["high"] - row["low"]) / 2 for row in intervals]
    widths = " to ".join(dict.fromkeys(f"{bound(halves):.1f}" for bound in (min, max)))
    kinds = " or ".join(dict.fromkeys(row["interval"] for row in intervals))
    return f"{format_seeds(scored)}, 95 %: \N{PLUS-MINUS SIGN}{widths} over {kinds}"


def _join_lines(panel: Panel, squares: PanelMap) -> str:
    """Join the small lines of a panel: its references, then seeds and intervals."""
    return "\n".join(line for line in (panel.references, squares.note) if line)


def _average_scored(values: Array) -> float | None:
    """Return the mean of the values that are not NaN; None without one."""
    count = len(values) - int(np.isnan(values).sum())
    return float(np.nansum(values) / count) if count else None


def _draw_heat_map(
    axes: Axes,
    points: Collection[MapPoint],
    values: Mapping[MapPoint, float],
    labels: Mapping[MapPoint, str],
    colors: Colors,
) -> None:
    """Draw a square per (lmbda, divergence): coloured by value, the largest bold, hatched without a value.

    `pcolormesh`, not `imshow`: it stays a vector drawing in SVG, so that a report's page holds no embedded
    image.
    """
    lmbdas = sorted({lmbda for lmbda, _ in points})
    divergences = sorted({divergence for _, divergence in points})
    matrix = np.array([[values.get((lmbda, column), np.nan) for column in divergences] for lmbda in lmbdas])
    colormap, norm = colors
    largest, size = max(values.values(), default=None), _choose_value_size(axes, len(divergences), labels)
    column_edges, row_edges = np.arange(len(divergences) + 1) - 0.5, np.arange(len(lmbdas) + 1) - 0.5
    axes.tick_params(which="both", length=0)  # before there are many ticks to change
    axes.set_axisbelow(False)  # the lines of the paper's colour separate the squares
    axes.grid(False, which="major")
    axes.grid(True, which="minor", color=PAPER, linewidth=1.2)
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
                fontsize=min(size, SMALL_SIZE) if value is None or "\n" in label else size,
                fontstyle="italic" if value is None else "normal",
                fontweight="bold" if value is not None and value == largest else "normal",
            ).set_in_layout(False)  # it lies within its square, so that nothing needs to measure it
    axes.set_xticks(
        range(len(divergences)), [divergence.label.replace(" ", "\n", 1) for divergence in divergences]
    )
    axes.set_yticks(range(len(lmbdas)), [f"{lmbda:g}" for lmbda in lmbdas])
    axes.set_xticks(column_edges, minor=True)
    axes.set_yticks(row_edges, minor=True)
    axes.set_xlabel("divergence", labelpad=1, fontsize=SMALL_SIZE)
    axes.set_ylabel("λ", rotation=0, labelpad=6, va="center")
    axes.spines[:].set_visible(False)


def _choose_value_size(axes: Axes, columns: int, labels: Mapping[MapPoint, str]) -> float:
    """Return the text size, in points, at which the longest line of a label fits its square."""
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None and place is not None
    square = 72 * (figure.get_figwidth() / place.get_gridspec().ncols - _LABELS_WIDTH) / columns
    longest = max((len(line) for label in labels.values() for line in label.split("\n")), default=1)
    return min(_VALUE_SIZE, max(square / (0.64 * longest), _MIN_VALUE_SIZE))


def choose_colors(panels: Sequence[Sequence[float]], is_gain: bool) -> Colors:
    """Return (colormap, norm) for the values of all panels of a figure.

    Gains diverge around 0, equally far on both sides, whatever their signs. Where the largest |value| of one
    panel is less than a quarter of another's, the scale is of their square roots. Scores span their range.
    """
    values = [value for panel in panels for value in panel]
    if not is_gain:
        low, high = min(values, default=0.0), max(values, default=0.0)
        return SCORE_COLORS, Normalize(low, high) if low < high else Normalize(low - 1, high + 1)
    peaks = [peak for panel in panels if panel and (peak := max(map(abs, panel))) > 0]
    end = max(peaks, default=1.0)
    if end > SQUARE_ROOT_RATIO * min(peaks, default=1.0):
        return GAIN_COLORS, FuncNorm((_take_signed_root, _square_signed), -end, end)
    return GAIN_COLORS, Normalize(-end, end)


def _take_signed_root(values: Array) -> Array:
    """Return the square roots of |values| with their signs."""
    return np.asarray(np.sign(values) * np.sqrt(np.abs(values)))


def _square_signed(values: Array) -> Array:
    """Return the squares of values with their signs: the inverse of `_take_signed_root`."""
    return np.asarray(np.sign(values) * np.square(values))


def _build_bar(colors: Colors, label: str, maps: Iterable[Mapping[Any, float]]) -> ColorBar:
    """Return the colour bar of some maps' values, which says if its scale is of square roots."""
    colormap, norm = colors
    label = f"{label}, square-root scale" if isinstance(norm, FuncNorm) else label
    return ColorBar(colormap, norm, label, [value for values in maps for value in values.values()])


def _choose_decimals(values: Iterable[float]) -> int:
    """Return the decimals of labels: 2 if all |values| are below 2 and one needs them, else 1."""
    numbers = list(values)
    is_small = bool(numbers) and max(map(abs, numbers)) < 2
    return 2 if is_small and any(abs(10 * value - round(10 * value)) > 1e-6 for value in numbers) else 1
