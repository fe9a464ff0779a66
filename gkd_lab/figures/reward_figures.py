"""What a reward and distillation give together: the score's gain against the reward's (Fig. 5)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gkd_lab.claims import paper
from gkd_lab.figures.panels import create_axes
from gkd_lab.figures.style import INK, MUTED, apply_style, get_divergence_color
from gkd_lab.statistics.summaries import summary

RLEF_LABEL = "RLEF*"
MeanWithInterval = tuple[float, float | None, float | None]
"""A mean, and the ends of its interval, None where there is none."""


@dataclass(frozen=True)
class ModelGain:
    """A model's gains over the start."""

    label: str
    role: str
    beta: float | None
    reward_gain: MeanWithInterval
    score_gain: MeanWithInterval


def reward_gains(frame: pd.DataFrame, score: str, reward: str) -> Figure:
    """Gain in `score` against gain in `reward` over the start, a point for each alpha, beside the paper's.

    Two columns of the table; RLEF* is held to its own start, and the teacher is a point too. Means over
    seeds with 95 % intervals. Raises ValueError where the table has no finished start.
    """
    ours, theirs = list(_compute_run_gains(frame, score, reward)), list(_load_paper_gains())
    with apply_style():
        figure, axes = create_axes(2, 4.6, 3.8)
        _draw_gains(axes[0], ours, "this run", score, reward)
        _draw_gains(axes[1], theirs, "the paper: XSum, T5-base", "ROUGE-2", "entailment, %")
        return figure


def _compute_run_gains(frame: pd.DataFrame, score: str, reward: str) -> Iterator[ModelGain]:
    one_each = frame.assign(stands_for=None)  # RLEF* has one alpha, whatever it is crossed with
    described = [summary(one_each, name).to_dict("records") for name in (score, reward)]
    starts = [next(row["mean"] for row in rows if row["role"] == "start") for rows in described]
    if any(pd.isna(start) for start in starts):
        raise ValueError(f"the table has no {score} or {reward} of the student as it starts")
    for of_score, of_reward in zip(*described, strict=True):
        if of_score["role"] != "start" and of_score["n"] and of_reward["n"]:
            yield ModelGain(
                _format_label(of_score),
                str(of_score["role"]),
                float(of_score["beta"]) if of_score["role"] == "cell" else None,
                _compute_gain(of_reward, starts[1]),
                _compute_gain(of_score, starts[0]),
            )


def _format_label(row: Mapping[Any, Any]) -> str:
    if row["role"] == "teacher":
        return "teacher"
    return RLEF_LABEL if row["method"] == "rlef" else f"α = {row['alpha']:g}"


def _compute_gain(row: Mapping[Any, Any], start: float) -> MeanWithInterval:
    low, high = (None if pd.isna(row[end]) else float(row[end]) - start for end in ("low", "high"))
    return float(row["mean"]) - start, low, high


def _load_paper_gains() -> Iterator[ModelGain]:
    """Figure 5's points, which are gains over the start already."""
    found = paper.load_values()
    for _, group in found[found["figure"] == "5"].groupby(["role", "method", "alpha"], dropna=False):
        row = group.iloc[0].to_dict()
        of = dict(zip(group["metric"], group["value"], strict=True))
        beta = None if pd.isna(row["beta"]) else float(row["beta"])
        gains = [(float(of[name]), None, None) for name in ("entailment", "rouge2")]
        yield ModelGain(_format_label(row), str(row["role"]), beta, gains[0], gains[1])


def _draw_gains(axes: Axes, points: list[ModelGain], title: str, score: str, reward: str) -> None:
    for one in points:
        marker = {"teacher": "D"}.get(one.role, "s" if one.label == RLEF_LABEL else "o")
        color = MUTED if one.label in (RLEF_LABEL, "teacher") else get_divergence_color(one.beta)
        (x, low, high), (y, bottom, top) = one.reward_gain, one.score_gain
        if low is not None and high is not None:
            axes.hlines(y, low, high, color=color, lw=1, alpha=0.6)
        if bottom is not None and top is not None:
            axes.vlines(x, bottom, top, color=color, lw=1, alpha=0.6)
        axes.plot(x, y, marker, color=color, ms=6.5)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.margins(0.18)
    _label_points(axes, points)
    axes.set_xlabel(f"gain in the reward: {reward}")
    axes.set_ylabel(f"gain in the score: {score}")
    axes.set_title(title, fontweight="bold", pad=8)


def _label_points(axes: Axes, points: list[ModelGain]) -> None:
    """Labels beside their points; one that would hide another stands above it, and is led to its point."""
    axes.autoscale_view()
    pixels = axes.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    for one in sorted(points, key=lambda one: one.score_gain[0]):
        place = (one.reward_gain[0], one.score_gain[0])
        x, y = axes.transData.transform(place) / pixels
        lifted = y
        for other, height in taken:
            if abs(x - other) < LABEL_SIZE[0]:
                lifted = max(lifted, height + LABEL_SIZE[1])
        taken.append((x, lifted))
        led = {"arrowstyle": "-", "color": MUTED, "lw": 0.5} if lifted > y else None
        axes.annotate(
            one.label,
            place,
            (8, lifted - y + 4),
            textcoords="offset points",
            color=INK,
            fontsize=8.5,
            arrowprops=led,
        )


LABEL_SIZE = (45, 11)
"""Width and height of a label, in points."""

__all__ = ["reward_gains"]
