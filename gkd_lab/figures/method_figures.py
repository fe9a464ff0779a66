"""The paper's figures of methods from a table: bars (Figs 2, 9, A.10, A.11, A.15), scores along an axis
(Figs 1, 3).
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gkd_lab.figures.panels import create_axes
from gkd_lab.figures.style import INK, MARKERS, MUTED, apply_style, get_divergence_color
from gkd_lab.statistics.summaries import summary
from gkd_lab.tables.loss_labels import divergence_label, loss_label
from gkd_lab.tables.table import list_axes

METHOD_NAMES = {
    "sft": "SFT, as many steps",
    "seqkd": "SeqKD",
    "supervised_kd": "Supervised KD",
    "f_distill": "f-distill",
    "gkd_supervised": "Supervised GKD",
    "imitkd": "ImitKD",
    "gkd": "On-policy GKD",
}
"""The paper's names, in the order of Figure 9."""
_AXIS_LABELS = {"train_rows": "training rows", "beta": "divergence"}
_BASELINE_COLOR = "#b4bac4"
_LINE_COLORS = ("#8c8c8c", "#56b4e9", "#009e73", "#e69f00", "#0072b2", "#c8500a")


def bars(frame: pd.DataFrame, metric: str, bar_axis: str = "method") -> Figure:
    """A bar a method, in the order of Figure 9, with its value and 95 % interval; a panel for each task.

    GKD has a bar for each of its divergences, in the divergence's colour, a light one where it is
    supervised. Panels have the same rows: what one of them lacks is an empty row. `by` another axis, such
    as `objectives`, there is a bar for each of its values, as they are met, in the divergence's colour.
    """
    with apply_style():
        found = build_summary_panels(frame, metric, excluded_axes=(bar_axis,))
        rows = _list_bar_names(pd.concat([cells for _, cells in found]), bar_axis)
        width = max(4.2, 2.6 + 0.075 * max(map(len, rows)))
        figure, axes = create_axes(len(found), width, 0.8 + 0.27 * len(rows), sharey=True)
        for (title, cells), place in zip(found, axes, strict=True):
            _draw_bars(place, cells, rows, title, metric, bar_axis)
        axes[0].invert_yaxis()
        return figure


def _list_bar_names(cells: pd.DataFrame, bar_axis: str) -> list[str]:
    if bar_axis != "method":
        return list(dict.fromkeys(_format_axis_value(bar_axis, value) for value in cells[bar_axis]))
    rank = {method: number for number, method in enumerate(METHOD_NAMES)}
    ranked = cells.assign(rank=cells["method"].map(rank)).sort_values(["rank", "beta"])
    return list(dict.fromkeys(_format_method(row) for row in ranked.to_dict("records")))


def _draw_bars(
    axes: Axes, cells: pd.DataFrame, bar_names: list[str], title: str, metric: str, bar_axis: str
) -> None:
    digits = 1 if cells["mean"].abs().max() >= 2 else 2
    for row in cells.to_dict("records"):
        method = row["method"] if bar_axis == "method" else "gkd"
        place = bar_names.index(
            _format_method(row) if bar_axis == "method" else _format_axis_value(bar_axis, row[bar_axis])
        )
        color = get_divergence_color(row["beta"]) if method.startswith("gkd") else _BASELINE_COLOR
        alpha = 0.55 if method == "gkd_supervised" else 1.0
        axes.barh(place, row["mean"], color=color, alpha=alpha, height=0.72)
        if pd.notna(row["low"]) and pd.notna(row["high"]):
            axes.hlines(place, row["low"], row["high"], color=INK, lw=1.1)
        axes.annotate(
            f"{row['mean']:.{digits}f}".replace("-", "\N{MINUS SIGN}"), (_find_label_position(row), place), (4, 0),
            textcoords="offset points", va="center", color=INK, fontsize=8.5,
        )  # fmt: skip
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.set_yticks(range(len(bar_names)), bar_names)
    axes.margins(x=0.16)
    axes.grid(False, axis="y")
    axes.set_xlabel(_shorten_metric(metric))
    axes.set_title(title, fontweight="bold", pad=8)


def _find_label_position(row: dict[Any, Any]) -> float:
    """Right of the bar, of its interval and of zero."""
    return max(0.0, *(float(row[name]) for name in ("mean", "high") if pd.notna(row[name])))


def lines(frame: pd.DataFrame, metric: str, x_axis: str, line_axis: str) -> Figure:
    """Score along one axis, equally spaced, a line for each value of another, with 95 % intervals.

    A panel for each task and each value of a further axis. Raises ValueError where two settings meet at
    one point.
    """
    with apply_style():
        found = build_summary_panels(frame, metric, excluded_axes=(x_axis, line_axis))
        longest = max(cells[x_axis].nunique() for _, cells in found)
        figure, axes = create_axes(len(found), max(4.2, 1.05 * longest), 3.2)
        names = list_axis_values(frame[frame["role"] == "cell"], line_axis)
        for (title, cells), place in zip(found, axes, strict=True):
            for number, value in enumerate(names):
                line = cells[cells[line_axis] == value]
                offset = 0.05 * (number - (len(names) - 1) / 2)
                _draw_line(
                    place,
                    line,
                    x_axis,
                    list_axis_values(cells, x_axis),
                    offset,
                    _choose_line_style(line_axis, value, number),
                )
            ticks = list_axis_values(cells, x_axis)
            place.set_xticks(range(len(ticks)), [_format_axis_value(x_axis, tick) for tick in ticks])
            place.set_xlabel(_AXIS_LABELS.get(x_axis, x_axis.replace("_", " ")))
            place.set_ylabel(_shorten_metric(metric))
            place.grid(False, axis="x")
            place.set_title(title, fontweight="bold", pad=8)
        add_side_legend(figure, axes)
        return figure


def _draw_line(
    axes: Axes, line: pd.DataFrame, x_axis: str, ticks: Sequence[Any], offset: float, style: dict[str, Any]
) -> None:
    if line[x_axis].duplicated().any():
        raise ValueError(f"several settings at one value of {x_axis!r}: choose the rows, or another axis")
    line = line[line["mean"].notna()]
    if line.empty:
        return
    place = {value: number for number, value in enumerate(ticks)}
    line = line.assign(x=line[x_axis].map(place) + offset).sort_values("x")
    axes.plot(line["x"], line["mean"].astype(float), ms=5, lw=1.6, **style)
    axes.vlines(
        line["x"],
        line["low"].astype(float),
        line["high"].astype(float),
        color=style["color"],
        lw=1.2,
        alpha=0.6,
    )


def build_summary_panels(
    frame: pd.DataFrame, metric: str, excluded_axes: Sequence[str]
) -> list[tuple[str, pd.DataFrame]]:
    """(title, summary of its cells) for each task and each value of an axis that is not drawn itself.

    A collapsed cell stands once, under the first of its names.
    """
    described = summary(frame.assign(stands_for=None), metric)
    cells = described[(described["role"] == "cell") & described["mean"].notna()]
    if cells.empty:
        raise ValueError(f"no cell has a score in {metric!r} yet")
    varying = [
        axis
        for axis in list_axes(frame)
        if axis not in excluded_axes and cells[axis].nunique(dropna=False) > 1
    ]
    grouped = cells.groupby(["task", *varying], sort=False, dropna=False)
    return [
        (_format_title(dict(zip(["task", *varying], place, strict=True))), group) for place, group in grouped
    ]


def _format_title(axis_values: dict[str, Any]) -> str:
    return ", ".join(
        [str(axis_values.pop("task")), *(f"{axis} {value}" for axis, value in axis_values.items())]
    )


def list_axis_values(cells: pd.DataFrame, axis: str) -> list[Any]:
    """Numbers in order, methods in the paper's, other text as it is met."""
    found = list(cells[axis].dropna().unique())
    if axis == "method":
        return [method for method in METHOD_NAMES if method in found]
    return found if any(isinstance(value, str) for value in found) else sorted(found)


def _choose_line_style(axis: str, value: Any, number: int) -> dict[str, Any]:
    color = get_divergence_color(value) if axis == "beta" else _LINE_COLORS[number % len(_LINE_COLORS)]
    return {
        "color": color,
        "marker": MARKERS[number % len(MARKERS)],
        "label": _format_axis_value(axis, value, with_axis_name=True),
    }


def _format_axis_value(axis: str, value: Any, with_axis_name: bool = False) -> str:
    if axis == "method":
        return METHOD_NAMES[value]
    if axis == "beta":
        return divergence_label(value)
    if axis == "objectives":
        return loss_label(value)
    text = value if isinstance(value, str) else f"{value:,}" if value >= 100 else f"{value:g}"
    return f"{axis.replace('_', ' ')} {text}" if with_axis_name else text


def _format_method(row: dict[Any, Any]) -> str:
    name = METHOD_NAMES[row["method"]]
    return f"{name}, {divergence_label(row['beta'])}" if row["method"].startswith("gkd") else name


def add_side_legend(figure: Figure, axes: Sequence[Axes], extra_handles: Sequence[Line2D] = ()) -> None:
    known = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    handles = [*known.values(), *extra_handles]
    names = [str(handle.get_label()) for handle in handles]
    legend = figure.legend(handles, names, loc="outside right center")
    # Beside the panels, which keep their width.
    figure.set_figwidth(figure.get_figwidth() + legend.get_window_extent().width / figure.dpi)


def _shorten_metric(metric: str) -> str:
    return metric.rsplit("/", 1)[-1].replace("_", " ")
