"""Panels of a figure, one for each task and each value of a further axis: layout, titles, legends."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gkd_lab.figures.style import MUTED
from gkd_lab.statistics.summaries import SUMMARY_KEYS, expand_collapsed_cells, summarize_scores
from gkd_lab.tables.divergences import CellDivergence, map_divergences
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.loss_labels import format_axis_setting

MAX_COLUMNS = 3
TITLE_CHARACTERS = 46
"""Characters of a title's line, as wide as a panel."""


@dataclass(frozen=True)
class Panel:
    """The cells of one panel with the scores of their SFT student and their teacher."""

    title: str
    cells: pd.DataFrame
    """With the column `start_value`, the score of each cell's own SFT student."""
    start_score: float | None
    """Mean over the SFT students of these cells: one, or one for each seed."""
    teacher_score: float | None

    @property
    def subtitle(self) -> str:
        """Two lines: the SFT student's score as baseline, or that it is missing; the teacher's score."""
        teacher = "missing" if self.teacher_score is None else f"{self.teacher_score:.1f}"
        if self.start_score is None:
            return f"as measured: the SFT student is missing\nteacher {teacher}"
        return f"improvement over the SFT student ({self.start_score:.1f})\nteacher {teacher}"


def build_panels(scores: pd.DataFrame) -> list[Panel]:
    """Return a panel per task and combination of varying axes, of the rows of `select_scores`.

    Tasks without any value are left out, if another has one. Panels are in the table's order. Raises
    ValueError where no row is a cell's.
    """
    if not (scores["role"] == "cell").any():
        raise ValueError("the table has no cell: every row is of a teacher or an SFT student")
    measured = scores.loc[scores["value"].notna(), "task"].unique()
    scores = scores[scores["task"].isin(measured)] if len(measured) else scores
    cells = expand_collapsed_cells(scores)
    starts = scores[scores["role"] == "start"].drop_duplicates("cell").set_index("cell")["value"]
    cells = cells.assign(start_value=cells["start_cell"].map(starts).astype("float64"))
    varying = [axis for axis in list_axes(scores) if cells[axis].nunique(dropna=False) > 1]
    references = _References(scores)
    return [
        Panel(
            _format_title(dict(zip(["task", *varying], values, strict=True))),
            group,
            references.average("start", group),
            references.average("teacher", group),
        )
        for values, group in cells.groupby(["task", *varying], dropna=False, sort=False)
    ]


def build_summary_panels(
    scores: pd.DataFrame, excluded_axes: Sequence[str] = ()
) -> list[tuple[str, pd.DataFrame]]:
    """Return (title, cells' summary rows) per task and combination of varying axes not excluded.

    Takes the rows of `select_scores`. A collapsed cell stands once, under the first of its names. Raises
    ValueError where nothing has a score.
    """
    panel_axes = [axis for axis in list_axes(scores) if axis not in excluded_axes]
    other_axes = [axis for axis in excluded_axes if axis not in SUMMARY_KEYS]
    summaries = summarize_scores(scores.assign(stands_for=None), [*panel_axes, *other_axes])
    cells = summaries[(summaries["role"] == "cell") & summaries["mean"].notna()]
    if cells.empty:
        raise ValueError(f"no cell has a score in {scores['metric'].iloc[0]!r} yet")
    return split_panels(cells, panel_axes)


def split_panels(cells: pd.DataFrame, axes: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Return (title, rows) per task and combination of those axes that vary; nulls are not in titles."""
    varying = [axis for axis in axes if cells[axis].nunique(dropna=False) > 1]
    panels = []
    for (task, *values), group in cells.groupby(["task", *varying], sort=False, dropna=False):
        settings: dict[str, Any] = dict(zip(varying, values, strict=True))
        named = [f"{axis} {value}" for axis, value in settings.items() if pd.notna(value)]
        panels.append((", ".join([str(task), *named]), group))
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
    """Write a bold title and a muted two-line subtitle above a panel; it may be wider than the panel.

    For panels without ticks above them: a fixed `y` saves the search for them, a fifth of the time.
    """
    axes.set_title(title, pad=34, fontweight="bold", y=1.0)
    axes.annotate(
        subtitle, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
        color=MUTED, fontsize=9, va="bottom", linespacing=1.3, annotation_clip=False,
    ).set_in_layout(False)  # fmt: skip


def add_divergence_legend(
    figure: Figure, axes: Sequence[Axes], divergences: Sequence[CellDivergence]
) -> None:
    """Add one legend for all panels, in the order of `divergences`; none where nothing is drawn."""
    handles = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    labels = [divergence.label for divergence in divergences if divergence.label in handles]
    if labels:
        figure.legend([handles[label] for label in labels], labels, loc="outside right center")


def add_side_legend(figure: Figure, axes: Sequence[Axes], extra_handles: Sequence[Line2D] = ()) -> None:
    """Add one legend right of the panels, one entry per label, and widen the figure by it."""
    drawn = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    handles = [*drawn.values(), *extra_handles]
    names = [str(handle.get_label()) for handle in handles]
    legend = figure.legend(handles, names, loc="outside right center")
    figure.set_figwidth(figure.get_figwidth() + legend.get_window_extent().width / figure.dpi)


def group_cells_by_point(cells: pd.DataFrame) -> Iterator[tuple[float, CellDivergence, list[int]]]:
    """Yield (lmbda, divergence, positions of the cells there), sorted by lmbda, then divergence."""
    groups: dict[tuple[float, CellDivergence], list[int]] = {}
    points = zip(cells["lmbda"].tolist(), map_divergences(cells), strict=True)
    for position, point in enumerate(points):
        groups.setdefault(point, []).append(position)
    for lmbda, divergence in sorted(groups):
        yield float(lmbda), divergence, groups[lmbda, divergence]


def _format_title(values: dict[str, Any]) -> str:
    """Format task and axis values but nulls, wrapped to a panel's width; pops `task` from `values`."""
    task = str(values.pop("task"))
    settings = [format_axis_setting(axis, value) for axis, value in values.items() if pd.notna(value)]
    return textwrap.fill(", ".join([task, *settings]), TITLE_CHARACTERS)


class _References:
    """Scores of a table's reference models, read once for all of its panels."""

    def __init__(self, scores: pd.DataFrame) -> None:
        references = scores[scores["role"] != "cell"].drop_duplicates(["role", "cell"])
        columns = references["role"], references["cell"], references["value"]
        self._scores = [row for row in zip(*columns, strict=True) if pd.notna(row[2])]

    def average(self, role: str, cells: pd.DataFrame) -> float | None:
        """Return the mean score of these cells' starts or teachers; None where none is scored."""
        fingerprints = set(cells[f"{role}_cell"])
        values = [
            value
            for reference_role, fingerprint, value in self._scores
            if reference_role == role and fingerprint in fingerprints
        ]
        return float(np.mean(values)) if values else None


def format_metric(scores: pd.DataFrame) -> str:
    """Return the metric of `select_scores` for an axis label: `exact_match` -> `exact match`."""
    return str(scores["metric"].iloc[0]).replace("_", " ")


def format_signed(value: float, decimals: int = 1) -> str:
    """Format a number with + or a true minus sign and so many decimals."""
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")
