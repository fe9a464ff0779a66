"""Two scores against each other: quality and diversity (Fig. 4), reward and quality (Fig. 5)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gkd_lab.claims import paper
from gkd_lab.config.errors import ConfigError
from gkd_lab.figures.label_placement import LabelledPoint, place_labels
from gkd_lab.figures.layout import add_legend, create_axes, set_panel_title
from gkd_lab.figures.panels import METRIC_LABELS, format_gain, format_seeds, is_of_paper, split_panels
from gkd_lab.figures.style import MARKERS, MUTED, apply_style, get_divergence_color
from gkd_lab.statistics.summaries import summarize_scores
from gkd_lab.tables.divergences import (
    CellDivergence,
    get_divergence,
    list_divergences,
    select_divergence,
)
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.scores import list_score_names, select_scores


def tradeoff(table: pd.DataFrame, quality: str, diversity: str, *, width: float | None = None) -> Figure:
    """Draw quality against diversity of sampled text: a line per divergence, a mark per temperature.

    Takes the long table; both are metrics of evaluations that sample, with any number of samples. Means over
    seeds. A panel for each task and combination of varying axes. `width` is in inches: None is a column for
    one panel, else the text of a page. Raises ConfigError where no evaluation that
    samples has a metric, and ValueError where no cell has a score.
    """
    scores = _select_sampled_scores(table, (quality, diversity))
    cells = scores[(scores["role"] == "cell") & scores["value"].notna()]
    if cells.empty:
        raise ValueError(f"no cell has a score in {quality!r} of sampled text yet")
    temperatures = sorted(scores["temperature"].unique(), reverse=True)
    panels = split_panels(cells, list_axes(scores))
    with apply_style():
        figure, axes = create_axes(len(panels), 2.4, width=width, stretches=False)
        for (title, rows), panel_axes in zip(panels, axes, strict=True):
            for divergence in list_divergences(rows):
                means = _average_by_temperature(select_divergence(rows, divergence), temperatures)
                _draw_tradeoff_line(panel_axes, means[diversity], means[quality], divergence)
            panel_axes.set_xlabel(f"{METRIC_LABELS.get(diversity, diversity)} (100: always the same)")
            panel_axes.set_ylabel(METRIC_LABELS.get(quality, quality))
            set_panel_title(panel_axes, title, _describe_means(rows))
        add_legend(figure, axes, _create_temperature_handles(temperatures))
        return figure


def _describe_means(rows: pd.DataFrame) -> str:
    """Return how many seeds the means of a panel are over, or that they are the paper's."""
    if is_of_paper(rows):
        return "as printed in the paper"
    counts = rows.groupby(["temperature", "metric", "lmbda", "divergence", "beta"], dropna=False)[
        "cell"
    ].nunique()
    return f"mean of {format_seeds([{'n': count} for count in counts])}"


def _select_sampled_scores(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return the scores of each model in each metric at each temperature. Raises ConfigError without any."""
    sampled = table[table["decoding"] == "sample"]
    for metric in metrics:
        if metric not in set(sampled["metric"]):
            raise ConfigError(
                f"no evaluation that samples has the metric {metric!r}; the table has: "
                f"{', '.join(list_score_names(table))}"
            )
    return pd.concat(
        select_scores(rows, metric)
        for _, rows in sampled.groupby("temperature", sort=False)
        for metric in metrics
    )


def _average_by_temperature(scores: pd.DataFrame, temperatures: Sequence[float]) -> pd.DataFrame:
    """Return a row per temperature with the mean over seeds of each metric, NaN where there is none."""
    means = scores.groupby(["temperature", "metric"])["value"].mean().unstack("metric")
    return means.reindex(index=list(temperatures))


def _draw_tradeoff_line(
    axes: Axes, xs: "pd.Series[float]", ys: "pd.Series[float]", divergence: CellDivergence
) -> None:
    """Draw one divergence's line through its mean scores, with a marker for each temperature."""
    color = get_divergence_color(divergence)
    axes.plot(xs, ys, color=color, lw=1.0, alpha=0.7, label=divergence.label)
    for number, (x, y) in enumerate(zip(xs, ys, strict=True)):
        axes.plot(x, y, color=color, marker=MARKERS[number % len(MARKERS)], ms=4.5, ls="")


def _create_temperature_handles(temperatures: Sequence[float]) -> list[Line2D]:
    """Return legend entries, a marker for each temperature."""
    return [
        Line2D([], [], color=MUTED, ls="", marker=MARKERS[n % len(MARKERS)], label=f"temperature {value:g}")
        for n, value in enumerate(temperatures)
    ]


RLEF_LABEL = "RLEF*"
MeanWithInterval = tuple[float, float | None, float | None]
"""(mean, low, high); None where there is no interval."""


@dataclass(frozen=True)
class ModelGain:
    """Gains of a model over the student before distillation."""

    label: str
    role: str
    divergence: CellDivergence
    reward_gain: MeanWithInterval
    score_gain: MeanWithInterval
    n: int | None = None
    """Seeds; None where it is not told."""


def reward_gains(
    table: pd.DataFrame,
    score: str,
    reward: str,
    evaluation: str | None = None,
    *,
    width: float | None = None,
) -> Figure:
    """Draw gain in `score` against gain in `reward`, a point per model: this run, beside the paper.

    Takes the long table; both are metrics, and `evaluation` is as in `select_scores`. Gains are over the
    student before distillation. There is a point for each alpha, for RLEF*, which is regularized towards
    that student, and for the teacher. Means and 95 % intervals over seeds, of a single seed over its
    examples. `width` is in inches: None is the text of a page. Raises ValueError where the table has no
    finished start.
    """
    run_scores = [select_scores(table, metric, evaluation) for metric in (score, reward)]
    run_gains, paper_gains = list(_compute_run_gains(*run_scores)), list(_load_paper_gains())
    with apply_style():
        figure, axes = create_axes(2, 2.6, width=width)
        _draw_gains(axes[0], run_gains, f"this run: {run_scores[0]['task'].iloc[0]}", score, reward)
        _draw_gains(axes[1], paper_gains, "the paper: XSum, T5-base", "rouge2", "entailment")
        for panel_axes, gains in zip(axes, (run_gains, paper_gains), strict=True):
            place_labels(panel_axes, [_locate_gain(gain) for gain in gains])
        return figure


def _name_score(scores: pd.DataFrame) -> str:
    """Return `<evaluation>/<metric>` of `select_scores`."""
    return list_score_names(scores)[0]


def _compute_run_gains(scores: pd.DataFrame, rewards: pd.DataFrame) -> Iterator[ModelGain]:
    """Yield the gains of each model with both scores. Raises ValueError without start scores."""
    # RLEF* has one alpha, whatever it is crossed with.
    summaries = [
        summarize_scores(rows.assign(stands_for=None)).to_dict("records") for rows in (scores, rewards)
    ]
    starts = [next((row["mean"] for row in rows if row["role"] == "start"), math.nan) for rows in summaries]
    if any(pd.isna(start) for start in starts):
        names = " or ".join(_name_score(rows) for rows in (scores, rewards))
        raise ValueError(f"the table has no {names} of the student as it starts")
    for score_row, reward_row in zip(*summaries, strict=True):
        if score_row["role"] != "start" and score_row["n"] and reward_row["n"]:
            yield ModelGain(
                label=_format_label(score_row),
                role=str(score_row["role"]),
                divergence=get_divergence(score_row),
                reward_gain=_compute_gain(reward_row, starts[1]),
                score_gain=_compute_gain(score_row, starts[0]),
                n=int(min(score_row["n"], reward_row["n"])) if score_row["role"] == "cell" else None,
            )


def _format_label(row: Mapping[Any, Any]) -> str:
    """Return the label of a model's point: `teacher`, `RLEF*` or `α = 0.5`."""
    if row["role"] == "teacher":
        return "teacher"
    return RLEF_LABEL if row["method"] == "rlef" else f"α = {row['alpha']:g}"


def _compute_gain(row: Mapping[Any, Any], start: float) -> MeanWithInterval:
    """Return (mean, low, high) of a summary row, each minus the start's score; bounds may be None."""
    low, high = (None if pd.isna(row[end]) else float(row[end]) - start for end in ("low", "high"))
    return float(row["mean"]) - start, low, high


def _load_paper_gains() -> Iterator[ModelGain]:
    """Yield the models of the paper's Figure 5, whose numbers are gains already; no intervals."""
    values = paper.load_values()
    figure_values = values[values["figure"] == "5"]
    for _, group in figure_values.groupby(["role", "method", "alpha"], dropna=False):
        row = group.iloc[0].to_dict()
        gains = dict(zip(group["metric"], group["value"], strict=True))
        yield ModelGain(
            label=_format_label(row),
            role=str(row["role"]),
            divergence=get_divergence(row),
            reward_gain=(float(gains["entailment"]), None, None),
            score_gain=(float(gains["rouge2"]), None, None),
        )


def _draw_gains(axes: Axes, gains: list[ModelGain], title: str, score: str, reward: str) -> None:
    """Draw one panel: a point per model with its intervals and its label."""
    for gain in gains:
        marker = {"teacher": "D"}.get(gain.role, "s" if gain.label == RLEF_LABEL else "o")
        color = MUTED if gain.label in (RLEF_LABEL, "teacher") else get_divergence_color(gain.divergence)
        (x, left, right), (y, bottom, top) = gain.reward_gain, gain.score_gain
        if left is not None and right is not None:
            axes.hlines(y, left, right, color=color, lw=1, alpha=0.6)
        if bottom is not None and top is not None:
            axes.vlines(x, bottom, top, color=color, lw=1, alpha=0.6)
        axes.plot(x, y, marker, color=color, ms=5)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.margins(0.2)
    axes.set_xlabel(_format_gain_label(reward))
    axes.set_ylabel(_format_gain_label(score))
    seeds = [{"n": gain.n} for gain in gains if gain.n]
    note = f"{format_seeds(seeds)}, 95 % intervals" if seeds else "as printed in the paper"
    set_panel_title(axes, title, f"{note}, over the SFT student")


def _format_gain_label(name: str) -> str:
    """Return the label of the gain in a score `[<evaluation>/]<metric>`, in points."""
    return format_gain(name.rsplit("/", 1)[-1])


def _locate_gain(gain: ModelGain) -> LabelledPoint:
    """Return the point of a gain with its label and the ends of its intervals."""
    (x, left, right), (y, bottom, top) = gain.reward_gain, gain.score_gain
    return LabelledPoint(
        x,
        y,
        gain.label,
        (x if left is None else left, y if bottom is None else bottom),
        (x if right is None else right, y if top is None else top),
    )
