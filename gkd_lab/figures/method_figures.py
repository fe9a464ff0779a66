"""Methods compared: bars (Figs 2, 9, A.10, A.11, A.15) and lines along an axis (Figs 1, 3)."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gkd_lab.figures.layout import (
    MAX_COLUMNS,
    PANEL_WIDTH,
    TICK_STEPS,
    add_legend,
    count_columns,
    create_axes,
    set_panel_title,
)
from gkd_lab.figures.panels import (
    GAIN_PREFIX,
    LMBDA_LABEL,
    build_summary_panels,
    describe_intervals,
    format_metric,
)
from gkd_lab.figures.style import (
    BASELINE_BAR,
    INK,
    LINE_COLORS,
    MARKERS,
    METHOD_COLORS,
    MUTED,
    SMALL_SIZE,
    TEXT_WIDTH,
    apply_style,
    get_divergence_color,
)
from gkd_lab.statistics.summaries import summarize_scores
from gkd_lab.tables.divergences import get_divergence, map_divergences
from gkd_lab.tables.loss_labels import GKD_METHODS, METHOD_NAMES, format_method, loss_label
from gkd_lab.tables.scores import select_scores

DIVERGENCE_AXIS = "divergence"
_AXIS_LABELS = {
    "lmbda": LMBDA_LABEL,
    "train_rows": "training rows",
    "student.sft.rows": "rows of SFT and distillation",
}
_BAR_WIDTH = 1.25
"""Inches of a panel's bars, without the names of their rows."""
_BAR_HEIGHT = 0.72
"""Share of a row."""
_NAME_LENGTH = 34
"""Characters of a line of a bar's name."""


def bars(
    table: pd.DataFrame,
    metric: str,
    bar_axis: str = "method",
    evaluation: str | None = None,
    *,
    width: float | None = None,
) -> Figure:
    """Draw mean scores as bars, one per method in the order of Figure 9, with intervals.

    Takes the long table; `metric` and `evaluation` are as in `select_scores`. Intervals are at 95 % over
    seeds, of a single seed over its examples. A panel for each task and combination of other varying axes.
    GKD has a bar for each of its divergences, in the divergence's colour, a light one where it is supervised.
    Panels have the same rows, empty where a panel has no such method, `missing` where it has no score yet.
    With another `bar_axis`, such as `objectives`, there is a bar for each of its values in table order, in
    the divergence's colour; the axis `beta` stands for the divergence. `width` is in inches: None is the
    text of a page. Raises ValueError where no cell has the score.
    """
    bar_axis = DIVERGENCE_AXIS if bar_axis == "beta" else bar_axis
    scores = select_scores(table, metric, evaluation)
    with apply_style():
        panels = [
            (title, cells if bar_axis == DIVERGENCE_AXIS else _drop_unnamed_gaps(cells, [bar_axis]))
            for title, cells in build_summary_panels(scores, excluded_axes=(bar_axis,))
        ]
        bar_names = _list_bar_names(pd.concat([cells for _, cells in panels]), bar_axis)
        names = [_wrap_name(name) for name in bar_names]
        height = 0.95 + 0.165 * len(names) * max(1, 0.75 * max(name.count("\n") + 1 for name in names))
        width = TEXT_WIDTH if width is None else width
        label_width = 0.2 + 0.057 * max(len(line) for name in names for line in name.split("\n"))
        columns = max(1, min(MAX_COLUMNS, int((width - label_width) / _BAR_WIDTH)))
        figure, axes = create_axes(
            len(panels), height, panel_width=_BAR_WIDTH, width=width, sharey=True, columns=columns
        )
        title_width = (width - label_width) / count_columns(axes) - 0.1
        for (title, cells), panel_axes in zip(panels, axes, strict=True):
            _draw_bars(panel_axes, cells, bar_names, bar_axis)
            panel_axes.set_yticks(range(len(bar_names)), names)
            panel_axes.set_xlabel(format_metric(scores))
            note = describe_intervals(cells, cells.to_dict("records"))
            set_panel_title(panel_axes, title, note, title_width)
        axes[0].invert_yaxis()
        return figure


def _list_bar_names(cells: pd.DataFrame, bar_axis: str) -> list[str]:
    """Return distinct bar names: methods in Figure 9's order, other values in table order."""
    rows = cells.to_dict("records")
    if bar_axis == "method":
        order = list(METHOD_NAMES)
        rows = sorted(rows, key=lambda row: (order.index(row["method"]), get_divergence(row)))
    return list(dict.fromkeys(_name_bar(row, bar_axis) for row in rows))


def _name_bar(row: Mapping[Any, Any], bar_axis: str) -> str:
    """Return a row's bar name: its formatted value, for GKD methods with the divergence."""
    if bar_axis == DIVERGENCE_AXIS:
        return get_divergence(row).label
    if bar_axis == "method":
        return format_method(row["method"], get_divergence(row).label)
    return _format_axis_value(bar_axis, row[bar_axis])


def _drop_unnamed_gaps(cells: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    """Return the rows but those without a score and without a value of an axis.

    Such are cells of a run in one table with the paper's, which has axes that the run has not.
    """
    return cells[cells["mean"].notna() | cells[axes].notna().all(axis=1)]


def _wrap_name(name: str) -> str:
    """Return a bar's name in lines that leave room for the bars."""
    return "\n".join(textwrap.wrap(name, _NAME_LENGTH))


def _draw_bars(axes: Axes, cells: pd.DataFrame, bar_names: list[str], bar_axis: str) -> None:
    """Draw one panel's bars in the rows of `bar_names`, with values as text and with intervals."""
    decimals = 1 if cells["mean"].abs().max() >= 2 else 2
    rows = cells[cells["mean"].notna()].to_dict("records")
    names = [_name_bar(row, bar_axis) for row in rows]
    gaps = {_name_bar(row, bar_axis) for row in cells[cells["mean"].isna()].to_dict("records")}
    for name in sorted(gaps.difference(names), key=bar_names.index):
        y = bar_names.index(name)
        axes.barh(y, 0, height=_BAR_HEIGHT)  # the row's room
        _annotate_bar(axes, "missing", 0.0, y, MUTED)
    for row, name in zip(rows, names, strict=True):
        method = row["method"] if bar_axis == "method" else "gkd"
        y = bar_names.index(name)
        color = get_divergence_color(get_divergence(row)) if method in GKD_METHODS else BASELINE_BAR
        alpha = 0.55 if method == "gkd_supervised" else 1
        axes.barh(y, row["mean"], color=color, alpha=alpha, height=_BAR_HEIGHT)
        if pd.notna(row["low"]) and pd.notna(row["high"]):
            axes.hlines(y, row["low"], row["high"], color=INK, lw=0.9)
        right_end = max(0.0, *(float(row[name]) for name in ("mean", "high") if pd.notna(row[name])))
        label = f"{row['mean']:.{decimals}f}".replace("-", "\N{MINUS SIGN}")
        _annotate_bar(axes, label, right_end, y, INK)
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.margins(x=0.22)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))
    axes.grid(False, axis="y")


def _annotate_bar(axes: Axes, text: str, x: float, y: int, color: str) -> None:
    """Write a text to the right of a bar's end."""
    axes.annotate(
        text, (x, y), (3, 0), textcoords="offset points", va="center", color=color, fontsize=SMALL_SIZE
    )


def lines(
    table: pd.DataFrame,
    metric: str,
    x_axis: str,
    line_axis: str,
    evaluation: str | None = None,
    *,
    width: float | None = None,
) -> Figure:
    """Draw mean scores along `x_axis`, equally spaced, a line per value of `line_axis`, with intervals.

    Takes the long table; `metric` and `evaluation` are as in `select_scores`. Intervals are at 95 % over
    seeds, of a single seed over its examples. The axis `divergence` (or `beta`) has a place for each kind
    and beta. A panel for each task and combination of other varying axes. A line has a gap where a cell has
    no score, and goes on where it has no cell. SFT students that differ along `x_axis` are a dashed line,
    where there is one panel; of gains it is 0.
    `width` is in inches: None is a column for one panel, else the text of a page. Raises ValueError where no
    cell has the score, and where two settings meet at one point.
    """
    x_axis, line_axis = (DIVERGENCE_AXIS if axis == "beta" else axis for axis in (x_axis, line_axis))
    scores = select_scores(table, metric, evaluation)
    with apply_style():
        panels = [
            (title, _select_line_points(cells.assign(divergence=map_divergences(cells)), x_axis, line_axis))
            for title, cells in build_summary_panels(scores, excluded_axes=(x_axis, line_axis))
        ]
        longest = max(cells[x_axis].nunique() for _, cells in panels)
        figure, axes = create_axes(
            len(panels), 2.3, panel_width=max(PANEL_WIDTH, 0.4 + 0.42 * longest), width=width, stretches=False
        )
        cells = scores[scores["role"] == "cell"]
        line_values = list_axis_values(cells.assign(divergence=map_divergences(cells)), line_axis)
        for (title, cells), panel_axes in zip(panels, axes, strict=True):
            if len(panels) == 1:
                _draw_starts(panel_axes, scores, x_axis)
            _draw_lines(panel_axes, cells, x_axis, line_axis, line_values)
            panel_axes.set_ylabel(format_metric(scores))
            set_panel_title(panel_axes, title, describe_intervals(cells, cells.to_dict("records")))
            if str(scores["metric"].iloc[0]).startswith(GAIN_PREFIX):
                panel_axes.axhline(0, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1, label="SFT student")
        add_legend(figure, axes)
        return figure


def _select_line_points(cells: pd.DataFrame, x_axis: str, line_axis: str) -> pd.DataFrame:
    """Return the rows with a score, and the gaps of their lines: points where no row has one."""
    scored = cells[cells["mean"].notna()]
    gaps = _drop_unnamed_gaps(cells, [x_axis, line_axis]).drop(scored.index)
    gaps = gaps[gaps[line_axis].isin(scored[line_axis])]
    points = pd.concat([scored, gaps])
    is_repeated = points.duplicated([x_axis, line_axis]) & points["mean"].isna()
    return points[~is_repeated].sort_index()


def _draw_starts(axes: Axes, scores: pd.DataFrame, x_axis: str) -> None:
    """Draw the SFT students as a dashed line, if each value of `x_axis` has its own."""
    starts = scores[scores["role"] == "start"]
    if x_axis not in starts or starts[x_axis].isna().any() or starts[x_axis].nunique() < 2:
        return
    line = summarize_scores(starts, [x_axis])
    if line[x_axis].duplicated().any():
        return
    ticks = list_axis_values(line, x_axis)
    line = line.assign(x=line[x_axis].map(ticks.index)).sort_values("x")
    axes.plot(line["x"], line["mean"].astype(float), color=MUTED, lw=0.9, ls=(0, (4, 3)), label="SFT student")
    axes.vlines(line["x"], line["low"].astype(float), line["high"].astype(float), color=MUTED, lw=0.9)


def _draw_lines(
    axes: Axes, cells: pd.DataFrame, x_axis: str, line_axis: str, line_values: Sequence[Any]
) -> None:
    """Draw one panel's lines, shifted sideways so that intervals do not overlap."""
    ticks = list_axis_values(cells, x_axis)
    for number, value in enumerate(line_values):
        line = cells[cells[line_axis] == value]
        if line[x_axis].duplicated().any():
            raise ValueError(f"several settings at one value of {x_axis!r}: choose the rows, or another axis")
        if line.empty:
            continue
        offset = 0.05 * (number - (len(line_values) - 1) / 2)
        line = line.assign(x=line[x_axis].map(ticks.index) + offset).sort_values("x")
        style = _choose_line_style(line_axis, value, number)
        axes.plot(line["x"], line["mean"].astype(float), **style)
        low, high = line["low"].astype(float), line["high"].astype(float)
        axes.vlines(line["x"], low, high, color=style["color"], lw=1.0, alpha=0.6)
    labels = [_format_axis_value(x_axis, tick).replace(" ", "\n", 1) for tick in ticks]
    axes.set_xticks(range(len(ticks)), labels)
    axes.set_xlim(-0.35, len(ticks) - 0.65)
    axes.set_xlabel(_AXIS_LABELS.get(x_axis, x_axis.replace("_", " ")))
    axes.grid(False, axis="x")


def list_axis_values(cells: pd.DataFrame, axis: str) -> list[Any]:
    """Return distinct values of an axis: numbers sorted, methods as in Figure 9, text in table order."""
    values = list(cells[axis].dropna().unique())
    if axis == "method":
        return [method for method in METHOD_NAMES if method in values]
    return values if any(isinstance(value, str) for value in values) else sorted(values)


def _choose_line_style(axis: str, value: Any, number: int) -> dict[str, Any]:
    """Return colour, marker and label of a line as plot arguments; divergences have their own colour."""
    color: Any = LINE_COLORS[number % len(LINE_COLORS)]
    if axis == DIVERGENCE_AXIS:
        color = get_divergence_color(value)
    elif axis == "method":
        color, number = METHOD_COLORS[value], list(METHOD_COLORS).index(value)
    return {
        "color": color,
        "marker": MARKERS[number % len(MARKERS)],
        "label": _format_axis_value(axis, value, with_axis_name=True),
    }


def _format_axis_value(axis: str, value: Any, with_axis_name: bool = False) -> str:
    """Format a label: method and divergence by name, losses by terms, numbers with thousands separators."""
    if axis == "method":
        return METHOD_NAMES[value]
    if axis == DIVERGENCE_AXIS:
        return str(value.label)
    if axis == "objectives":
        return loss_label(value)
    text = value if isinstance(value, str) else f"{value:,.10g}"
    name = "λ =" if axis == "lmbda" else axis.replace("_", " ")
    return f"{name} {text}" if with_axis_name else text
