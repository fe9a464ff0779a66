"""Panels of a figure, one for each task and each value of a further axis: their rows, titles and notes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.statistics.summaries import (
    NO_INTERVAL,
    SUMMARY_KEYS,
    expand_collapsed_cells,
    summarize_scores,
)
from gkd_lab.tables.divergences import CellDivergence, map_divergences
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.loss_labels import format_axis_setting
from gkd_lab.tables.scores import PAPER_SOURCE, SOURCE_AXIS

METRIC_LABELS = {
    "accuracy": "accuracy (%)",
    "exact_match": "exact match (%)",
    "label_accuracy": "accuracy of labels (%)",
    "tag_accuracy": "accuracy of tags (%)",
    "f1_macro": "macro F1 (%)",
    "f1_binary": "F1 (%)",
    "tag_f1_macro": "macro F1 of tags (%)",
    "matthews": "Matthews correlation (\N{MULTIPLICATION SIGN}100)",
    "pearson": "Pearson correlation (\N{MULTIPLICATION SIGN}100)",
    "spearman": "Spearman correlation (\N{MULTIPLICATION SIGN}100)",
    "bleu": "BLEU",
    "chrf": "chrF",
    "mmlu": "MMLU (%)",
    "bbh": "BBH (%)",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "self_bleu": "Self-BLEU",
    "train_seconds": "training (s)",
}
"""Metrics with their units; those without are on their own scale of 0 to 100."""
LMBDA_LABEL = "λ, share of student-written batches"
GAIN_PREFIX = "gain in "
"""How the metric of `add_gain` begins."""


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
    def references(self) -> str:
        """The scores of the SFT student and the teacher, or that they are missing."""
        start, teacher = (
            "missing" if score is None else f"{score:.1f}" for score in (self.start_score, self.teacher_score)
        )
        if self.start_score is None:
            return f"as measured: the SFT student is missing, teacher {teacher}"
        return f"gain over the SFT student ({start}), teacher {teacher}"


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

    Takes the rows of `select_scores`. A collapsed cell stands once, under the first of its names. Points of a
    panel without a score are rows with a missing mean; a panel has at least one score. Raises ValueError
    where nothing has a score.
    """
    panel_axes = [axis for axis in list_axes(scores) if axis not in excluded_axes]
    other_axes = [axis for axis in excluded_axes if axis not in SUMMARY_KEYS]
    summaries = summarize_scores(scores.assign(stands_for=None), [*panel_axes, *other_axes])
    cells = summaries[summaries["role"] == "cell"]
    has_score = cells["mean"].notna()
    if not has_score.any():
        raise ValueError(f"no cell has a score in {scores['metric'].iloc[0]!r} yet")
    panels = split_panels(cells[has_score], panel_axes)
    return [
        (title, pd.concat([group, _select_panel_rows(cells[~has_score], group, panel_axes)]).sort_index())
        for title, group in panels
    ]


def _select_panel_rows(cells: pd.DataFrame, panel: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """Return the cells with the task and the axis values of a panel, all of whose rows have the same."""
    is_same = pd.Series(True, index=cells.index)
    for name in ("task", *axes):
        value = panel[name].iloc[0]
        is_same &= cells[name].isna() if pd.isna(value) else cells[name] == value
    return cells[is_same]


def split_panels(cells: pd.DataFrame, axes: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Return (title, rows) per task and combination of those axes that vary; nulls are not in titles."""
    varying = [axis for axis in axes if cells[axis].nunique(dropna=False) > 1]
    panels = []
    for (task, *values), group in cells.groupby(["task", *varying], sort=False, dropna=False):
        settings: dict[str, Any] = dict(zip(varying, values, strict=True))
        named = [f"{axis} {value}" for axis, value in settings.items() if pd.notna(value)]
        panels.append((", ".join([str(task), *named]), group))
    return panels


def group_cells_by_point(cells: pd.DataFrame) -> Iterator[tuple[float, CellDivergence, list[int]]]:
    """Yield (lmbda, divergence, positions of the cells there), sorted by lmbda, then divergence."""
    groups: dict[tuple[float, CellDivergence], list[int]] = {}
    points = zip(cells["lmbda"].tolist(), map_divergences(cells), strict=True)
    for position, point in enumerate(points):
        groups.setdefault(point, []).append(position)
    for lmbda, divergence in sorted(groups):
        yield float(lmbda), divergence, groups[lmbda, divergence]


def _format_title(values: dict[str, Any]) -> str:
    """Format task and axis values but nulls; pops `task` from `values`."""
    task = str(values.pop("task"))
    settings = [format_axis_setting(axis, value) for axis, value in values.items() if pd.notna(value)]
    return ", ".join([task, *settings])


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


def describe_intervals(cells: pd.DataFrame, summaries: Iterable[Mapping[Any, Any]]) -> str:
    """Format the number of seeds and what the 95 % intervals are over: `3 seeds, 95 % over seeds`.

    Takes the panel's cells, whose axis `of` tells the paper's numbers, and rows of `summarize_scores`.
    """
    if is_of_paper(cells):
        return "as printed in the paper"
    scored = [row for row in summaries if row["n"]]
    kinds = list(dict.fromkeys(row["interval"] for row in scored if row["interval"] != NO_INTERVAL))
    if not scored:
        return ""
    return f"{format_seeds(scored)}, " + (f"95 % over {' or '.join(kinds)}" if kinds else "no intervals")


def format_seeds(summaries: Sequence[Mapping[Any, Any]]) -> str:
    """Format the number of seeds of summary rows: `1 seed`, `3 seeds` or `1 to 3 seeds`."""
    low, high = (int(bound(row["n"] for row in summaries)) for bound in (min, max))
    return f"{low} to {high} seeds" if low < high else f"{high} seed{'s' if high > 1 else ''}"


def is_of_paper(cells: pd.DataFrame) -> bool:
    """Return whether these rows are the paper's numbers, by the axis `of`."""
    return SOURCE_AXIS in cells and bool((cells[SOURCE_AXIS] == PAPER_SOURCE).all())


def format_metric(scores: pd.DataFrame) -> str:
    """Return metric and unit of `select_scores` for an axis: `accuracy (%)`, `gain in BLEU (points)`."""
    metric = str(scores["metric"].iloc[0])
    if metric.startswith(GAIN_PREFIX):
        return format_gain(metric.removeprefix(GAIN_PREFIX))
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def format_gain(metric: str) -> str:
    """Return the label of a gain in a metric, in points: `gain in ROUGE-2 (points)`."""
    label = METRIC_LABELS.get(metric, metric.replace("_", " "))
    return f"{GAIN_PREFIX}{label.split(' (')[0]} (points)"


def format_signed(value: float, decimals: int = 1) -> str:
    """Format a number with + or a true minus sign and so many decimals."""
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")
