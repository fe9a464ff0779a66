"""Quality against diversity of sampled text (Fig. 4)."""

import re
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gkd_lab.figures.method_figures import add_side_legend, build_summary_panels, list_axis_values
from gkd_lab.figures.panels import create_axes
from gkd_lab.figures.style import MARKERS, MUTED, apply_style, get_divergence_color
from gkd_lab.tables.loss_labels import divergence_label
from gkd_lab.tables.table import list_axes

_METRIC_LABELS = {"rouge2": "ROUGE-2", "self_bleu": "Self-BLEU"}


def tradeoff(frame: pd.DataFrame, quality: str, diversity: str) -> Figure:
    """Quality against diversity of sampled text: a line for each divergence, a mark for each temperature.

    The table has columns `sample<temperature>[x<samples>]/<metric>`; means over seeds.
    """
    with apply_style():
        temperatures = _list_temperatures(frame, quality)
        sampled = _add_temperature_columns(frame, temperatures, (quality, diversity))
        found = build_summary_panels(sampled, f"{quality} at {temperatures[0]:g}", excluded_axes=())
        figure, axes = create_axes(len(found), 4.4, 3.6)
        for (title, cells), place in zip(found, axes, strict=True):
            for beta in list_axis_values(cells, "beta"):
                rows = _select_table_rows(sampled, cells, beta)
                _draw_tradeoff_line(place, rows, temperatures, quality, diversity, beta)
            place.set_xlabel(f"{_METRIC_LABELS.get(diversity, diversity)}, 100: always the same")
            place.set_ylabel(_METRIC_LABELS.get(quality, quality))
            place.set_title(title, fontweight="bold", pad=8)
        add_side_legend(figure, axes, _create_temperature_handles(temperatures))
        return figure


def _list_temperatures(frame: pd.DataFrame, quality: str) -> list[float]:
    """The warmest first. Raises ValueError where nothing was sampled."""
    found = {_parse_temperature(name, quality) for name in frame.columns} - {None}
    if not found:
        raise ValueError(f"no column sample<temperature>/{quality} in the table")
    return sorted((value for value in found if value is not None), reverse=True)


def _parse_temperature(column: str, metric: str) -> float | None:
    match = re.fullmatch(rf"sample([0-9.]+)(?:x\d+)?/{re.escape(metric)}", column)
    return float(match[1]) if match else None


def _add_temperature_columns(
    frame: pd.DataFrame, temperatures: Sequence[float], metrics: Sequence[str]
) -> pd.DataFrame:
    """With columns `<metric> at <temperature>`, however many samples a prompt they come from."""
    scores = {}
    for metric in metrics:
        for value in temperatures:
            columns = [name for name in frame.columns if _parse_temperature(name, metric) == value]
            scores[f"{metric} at {value:g}"] = frame[columns].astype(float).bfill(axis="columns").iloc[:, 0]
    return frame.assign(**scores)


def _select_table_rows(frame: pd.DataFrame, cells: pd.DataFrame, beta: float) -> pd.DataFrame:
    """The table's rows of one divergence in one panel."""
    here = frame[(frame["role"] == "cell") & (frame["task"] == cells["task"].iloc[0])]
    for axis in list_axes(frame):
        here = here[here[axis].isin(cells[axis])]
    return here[here["beta"] == beta]


def _draw_tradeoff_line(
    axes: Axes, rows: pd.DataFrame, temperatures: Sequence[float], quality: str, diversity: str, beta: float
) -> None:
    x = [rows[f"{diversity} at {value:g}"].mean() for value in temperatures]
    y = [rows[f"{quality} at {value:g}"].mean() for value in temperatures]
    color = get_divergence_color(beta)
    axes.plot(x, y, color=color, lw=1.2, alpha=0.7, label=divergence_label(beta))
    for number, (one, other) in enumerate(zip(x, y, strict=True)):
        axes.plot(one, other, color=color, marker=MARKERS[number % len(MARKERS)], ms=6.5, ls="")


def _create_temperature_handles(temperatures: Sequence[float]) -> list[Line2D]:
    return [
        Line2D([], [], color=MUTED, ls="", marker=MARKERS[n % len(MARKERS)], label=f"temperature {value:g}")
        for n, value in enumerate(temperatures)
    ]
