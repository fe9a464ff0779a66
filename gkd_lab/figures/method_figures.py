"""The paper's figures of methods from a table: bars (Figs 2, 9, A.10, A.11, A.15), scores along an axis
(Figs 1, 3).
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gkd_lab.figures.panels import lay_out
from gkd_lab.figures.style import INK, MARKERS, MUTED, divergence_color, styled
from gkd_lab.statistics.summaries import summary
from gkd_lab.tables.loss_labels import divergence_label, loss_label
from gkd_lab.tables.table import axes_of

METHODS = {
    "sft": "SFT, as many steps",
    "seqkd": "SeqKD",
    "supervised_kd": "Supervised KD",
    "f_distill": "f-distill",
    "gkd_supervised": "Supervised GKD",
    "imitkd": "ImitKD",
    "gkd": "On-policy GKD",
}
"""The paper's names, in the order of Figure 9."""
_AXES = {"train_rows": "training rows", "beta": "divergence"}
_BASELINE = "#b4bac4"
_COLORS = ("#8c8c8c", "#56b4e9", "#009e73", "#e69f00", "#0072b2", "#c8500a")


def bars(frame: pd.DataFrame, metric: str, by: str = "method") -> Figure:
    """A bar a method, in the order of Figure 9, with its value and 95 % interval; a panel for each task.

    GKD has a bar for each of its divergences, in the divergence's colour, a light one where it is
    supervised. Panels have the same rows: what one of them lacks is an empty row. `by` another axis, such
    as `objectives`, there is a bar for each of its values, as they are met, in the divergence's colour.
    """
    with styled():
        found = described_panels(frame, metric, without=(by,))
        rows = _in_order(pd.concat([cells for _, cells in found]), by)
        width = max(4.2, 2.6 + 0.075 * max(map(len, rows)))
        figure, axes = lay_out(len(found), width, 0.8 + 0.27 * len(rows), sharey=True)
        for (title, cells), place in zip(found, axes, strict=True):
            _draw_bars(place, cells, rows, title, metric, by)
        axes[0].invert_yaxis()
        return figure


def _in_order(cells: pd.DataFrame, by: str) -> list[str]:
    if by != "method":
        return list(dict.fromkeys(_label(by, value) for value in cells[by]))
    rank = {method: number for number, method in enumerate(METHODS)}
    ranked = cells.assign(rank=cells["method"].map(rank)).sort_values(["rank", "beta"])
    return list(dict.fromkeys(_method_label(row) for row in ranked.to_dict("records")))


def _draw_bars(axes: Axes, cells: pd.DataFrame, rows: list[str], title: str, metric: str, by: str) -> None:
    digits = 1 if cells["mean"].abs().max() >= 2 else 2
    for row in cells.to_dict("records"):
        method = row["method"] if by == "method" else "gkd"
        place = rows.index(_method_label(row) if by == "method" else _label(by, row[by]))
        color = divergence_color(row["beta"]) if method.startswith("gkd") else _BASELINE
        alpha = 0.55 if method == "gkd_supervised" else 1.0
        axes.barh(place, row["mean"], color=color, alpha=alpha, height=0.72)
        if pd.notna(row["low"]) and pd.notna(row["high"]):
            axes.hlines(place, row["low"], row["high"], color=INK, lw=1.1)
        axes.annotate(
            f"{row['mean']:.{digits}f}".replace("-", "\N{MINUS SIGN}"), (_end(row), place), (4, 0),
            textcoords="offset points", va="center", color=INK, fontsize=8.5,
        )  # fmt: skip
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.margins(x=0.16)
    axes.grid(False, axis="y")
    axes.set_xlabel(_short(metric))
    axes.set_title(title, fontweight="bold", pad=8)


def _end(row: dict[Any, Any]) -> float:
    """Right of the bar, of its interval and of zero."""
    return max(0.0, *(float(row[name]) for name in ("mean", "high") if pd.notna(row[name])))


def lines(frame: pd.DataFrame, metric: str, along: str, apart: str) -> Figure:
    """Score along one axis, equally spaced, a line for each value of another, with 95 % intervals.

    A panel for each task and each value of a further axis. Raises ValueError where two settings meet at
    one point.
    """
    with styled():
        found = described_panels(frame, metric, without=(along, apart))
        longest = max(cells[along].nunique() for _, cells in found)
        figure, axes = lay_out(len(found), max(4.2, 1.05 * longest), 3.2)
        names = values_of(frame[frame["role"] == "cell"], apart)
        for (title, cells), place in zip(found, axes, strict=True):
            for number, value in enumerate(names):
                line = cells[cells[apart] == value]
                offset = 0.05 * (number - (len(names) - 1) / 2)
                _draw_line(place, line, along, values_of(cells, along), offset, _look(apart, value, number))
            ticks = values_of(cells, along)
            place.set_xticks(range(len(ticks)), [_label(along, tick) for tick in ticks])
            place.set_xlabel(_AXES.get(along, along.replace("_", " ")))
            place.set_ylabel(_short(metric))
            place.grid(False, axis="x")
            place.set_title(title, fontweight="bold", pad=8)
        legend_of(figure, axes)
        return figure


def _draw_line(
    axes: Axes, line: pd.DataFrame, along: str, ticks: Sequence[Any], offset: float, look: dict[str, Any]
) -> None:
    if line[along].duplicated().any():
        raise ValueError(f"several settings at one value of {along!r}: choose the rows, or another axis")
    line = line[line["mean"].notna()]
    if line.empty:
        return
    place = {value: number for number, value in enumerate(ticks)}
    line = line.assign(x=line[along].map(place) + offset).sort_values("x")
    axes.plot(line["x"], line["mean"].astype(float), ms=5, lw=1.6, **look)
    axes.vlines(
        line["x"],
        line["low"].astype(float),
        line["high"].astype(float),
        color=look["color"],
        lw=1.2,
        alpha=0.6,
    )


def described_panels(
    frame: pd.DataFrame, metric: str, without: Sequence[str]
) -> list[tuple[str, pd.DataFrame]]:
    """(title, summary of its cells) for each task and each value of an axis that is not drawn itself.

    A collapsed cell stands once, under the first of its names.
    """
    described = summary(frame.assign(stands_for=None), metric)
    cells = described[(described["role"] == "cell") & described["mean"].notna()]
    if cells.empty:
        raise ValueError(f"no cell has a score in {metric!r} yet")
    varying = [
        axis for axis in axes_of(frame) if axis not in without and cells[axis].nunique(dropna=False) > 1
    ]
    grouped = cells.groupby(["task", *varying], sort=False, dropna=False)
    return [(_title(dict(zip(["task", *varying], place, strict=True))), group) for place, group in grouped]


def _title(place: dict[str, Any]) -> str:
    return ", ".join([str(place.pop("task")), *(f"{axis} {value}" for axis, value in place.items())])


def values_of(cells: pd.DataFrame, axis: str) -> list[Any]:
    """Numbers in order, methods in the paper's, other text as it is met."""
    found = list(cells[axis].dropna().unique())
    if axis == "method":
        return [method for method in METHODS if method in found]
    return found if any(isinstance(value, str) for value in found) else sorted(found)


def _look(axis: str, value: Any, number: int) -> dict[str, Any]:
    color = divergence_color(value) if axis == "beta" else _COLORS[number % len(_COLORS)]
    return {
        "color": color,
        "marker": MARKERS[number % len(MARKERS)],
        "label": _label(axis, value, named=True),
    }


def _label(axis: str, value: Any, named: bool = False) -> str:
    if axis == "method":
        return METHODS[value]
    if axis == "beta":
        return divergence_label(value)
    if axis == "objectives":
        return loss_label(value)
    text = value if isinstance(value, str) else f"{value:,}" if value >= 100 else f"{value:g}"
    return f"{axis.replace('_', ' ')} {text}" if named else text


def _method_label(row: dict[Any, Any]) -> str:
    name = METHODS[row["method"]]
    return f"{name}, {divergence_label(row['beta'])}" if row["method"].startswith("gkd") else name


def legend_of(figure: Figure, axes: Sequence[Axes], more: Sequence[Line2D] = ()) -> None:
    known = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    handles = [*known.values(), *more]
    names = [str(handle.get_label()) for handle in handles]
    legend = figure.legend(handles, names, loc="outside right center")
    # Beside the panels, which keep their width.
    figure.set_figwidth(figure.get_figwidth() + legend.get_window_extent().width / figure.dpi)


def _short(metric: str) -> str:
    return metric.rsplit("/", 1)[-1].replace("_", " ")
