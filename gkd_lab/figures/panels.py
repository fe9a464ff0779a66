"""Small multiples: one panel for each task and each value of a further axis."""

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gkd_lab.figures.style import MUTED
from gkd_lab.statistics.summaries import NO_BETA, expand_collapsed_cells
from gkd_lab.tables.loss_labels import format_axis_setting
from gkd_lab.tables.table import list_axes

MAX_COLUMNS = 3
TITLE_CHARACTERS = 46
"""Characters of a title's line, as wide as a panel."""


@dataclass(frozen=True)
class Panel:
    """The cells of one panel, its title, and the scores to hold them against."""

    title: str
    cells: pd.DataFrame
    start_score: float | None
    teacher_score: float | None

    @property
    def subtitle(self) -> str:
        """What improvements are measured against, and the teacher's score."""
        teacher = "missing" if self.teacher_score is None else f"{self.teacher_score:.1f}"
        if self.start_score is None:
            return f"as measured: the SFT student is missing\nteacher {teacher}"
        return f"improvement over the SFT student ({self.start_score:.1f})\nteacher {teacher}"


def build_panels(frame: pd.DataFrame, metric: str, task: str | None) -> list[Panel]:
    """Panels in the table's order; of one task, or of all tasks that have the metric."""
    if metric not in frame.columns:
        scores = [name for name in frame.columns if "/" in name and not name.endswith((".low", ".high"))]
        raise ValueError(f"no column {metric!r} in the table; scores are: {', '.join(scores)}")
    cells = expand_collapsed_cells(frame)
    measured = [name for name, group in frame.groupby("task") if group[metric].notna().any()]
    wanted = [task] if task is not None else measured or list(cells["task"].unique())
    cells = cells[cells["task"].isin(wanted)]
    varying = [axis for axis in list_axes(frame) if cells[axis].nunique(dropna=False) > 1]
    return [
        Panel(
            _format_title(dict(zip(["task", *varying], values, strict=True))),
            group,
            _find_reference_score(frame, metric, "start", group),
            _find_reference_score(frame, metric, "teacher", group),
        )
        for values, group in cells.groupby(["task", *varying], dropna=False, sort=False)
    ]


def create_axes(
    count: int, width: float, height: float, sharey: bool = False, columns: int = MAX_COLUMNS
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `width` x `height` inches, at most `columns` a row."""
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
    """Title in ink over two quiet lines, which may be wider than the panel."""
    axes.set_title(title, pad=34, fontweight="bold")
    axes.annotate(
        subtitle, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
        color=MUTED, fontsize=9, va="bottom", linespacing=1.3, annotation_clip=False,
    ).set_in_layout(False)  # fmt: skip


def add_divergence_legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend for all panels, forward KL first; nothing where nothing is drawn."""
    handles = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    if handles:
        labels = sorted(map(str, handles), key=_parse_beta)
        figure.legend([handles[label] for label in labels], labels, loc="outside right center")


def _parse_beta(label: str) -> float:
    """The beta that a label of `divergence_label` stands for."""
    ends = {"Forward KL": 0.0, "Reverse KL": 1.0, "Total variation": NO_BETA}
    return ends[label] if label in ends else float(label[4:-1])


def group_cells_by_point(cells: pd.DataFrame) -> Iterator[tuple[float, float, pd.DataFrame]]:
    """(lmbda, beta, the cells there: one a seed)."""
    for _, group in cells.groupby(["lmbda", "beta"], sort=True):
        yield float(group["lmbda"].iloc[0]), float(group["beta"].iloc[0]), group


def _format_title(values: dict[str, object]) -> str:
    task = str(values.pop("task"))
    said = ", ".join([task, *(format_axis_setting(axis, value) for axis, value in values.items())])
    return textwrap.fill(said, TITLE_CHARACTERS)


def _find_reference_score(frame: pd.DataFrame, metric: str, role: str, cells: pd.DataFrame) -> float | None:
    used = frame[(frame["role"] == role) & frame["cell"].isin(cells[f"{role}_cell"].unique())]
    scores = used[metric].dropna()
    return float(scores.iloc[0]) if len(scores) == 1 else None
