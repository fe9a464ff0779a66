"""Methods over all tasks: interquartile means and performance profiles (Agarwal et al. 2021)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gkd_lab.figures.panels import create_axes
from gkd_lab.figures.style import INK, LINE_COLORS, MUTED, apply_style, get_divergence_color
from gkd_lab.statistics.aggregates import BASELINES, AggregatedScores, MethodScores, aggregate_scores
from gkd_lab.statistics.noise import Array
from gkd_lab.tables.divergences import get_divergence
from gkd_lab.tables.scores import select_primary_scores

THRESHOLDS = 200
MAX_RANGE = (-1.0, 2.0)
"""Normalised scores beyond which a profile is not drawn."""
SCORE_LABEL = "normalised score: 0 SFT student, 1 teacher"


def interquartile_means(table: pd.DataFrame) -> Figure:
    """Draw each method's mean of the middle half of its normalised scores, with a 95 % interval.

    Takes the long table, and of each task the first metric of its first evaluation. A row per method, or
    per lmbda and divergence. The interval covers the seeds of these tasks. Raises ValueError where no method
    has a score in all tasks.
    """
    return draw_interquartile_means(aggregate_scores(select_primary_scores(table)))


def profiles(table: pd.DataFrame) -> Figure:
    """Draw performance profiles: the share of a method's runs whose normalised score is above a threshold.

    Takes the long table, and of each task the first metric of its first evaluation. A panel for each of
    baselines, Supervised GKD and On-policy GKD, or for each lmbda; shaded are pointwise 95 % bands over the
    seeds of these tasks. Raises ValueError where no method has a score in all tasks.
    """
    return draw_profiles(aggregate_scores(select_primary_scores(table)))


def draw_interquartile_means(aggregated: AggregatedScores) -> Figure:
    """Draw `interquartile_means` of these scores. Raises ValueError without any."""
    methods = _list_methods(aggregated)
    with apply_style():
        figure, (axes,) = create_axes(1, 5.8, 1.0 + 0.27 * len(methods))
        estimates = [method.estimate_interquartile_mean() for method in methods]
        right = max(high for e in estimates for high in (e.high(), e.effect) if high is not None)
        for y, (method, estimate) in enumerate(zip(methods, estimates, strict=True)):
            color = MUTED if method.group == BASELINES else _choose_color(method, methods)
            low, high = estimate.low(), estimate.high()
            text = f"{estimate.effect:.2f}"
            if low is not None and high is not None:
                axes.hlines(y, low, high, color=color, lw=4, alpha=0.35)
                text += f" [{low:.2f}, {high:.2f}]"
            axes.plot(estimate.effect, y, "o", color=color, ms=5.5)
            text = text.replace("-", "\N{MINUS SIGN}")
            axes.annotate(
                text, (1, y), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", color=INK, fontsize=8.5,
            )  # fmt: skip
        axes.set_yticks(range(len(methods)), [method.label for method in methods])
        axes.set_xlim(right=right + 0.02)
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(f"interquartile mean\n{SCORE_LABEL}", fontsize=8.5)
        return figure


def draw_profiles(aggregated: AggregatedScores) -> Figure:
    """Draw `profiles` of these scores. Raises ValueError without any."""
    methods = _list_methods(aggregated)
    groups = list(dict.fromkeys(method.group for method in methods))
    values = np.concatenate([scores for method in methods for scores in method.strata])
    low, high = np.clip([values.min(), values.max()], *MAX_RANGE)
    thresholds = np.linspace(min(low - 0.05, 0), max(high + 0.05, 1), THRESHOLDS)
    with apply_style():
        figure, axes = create_axes(len(groups), 4.2, 3.4, sharey=True)
        for group, panel_axes in zip(groups, axes, strict=True):
            members = [method for method in methods if method.group == group]
            for method in members:
                _draw_profile(panel_axes, method, thresholds, _choose_color(method, methods))
            panel_axes.set_title(group, fontweight="bold", pad=8)
            panel_axes.set_xlabel(SCORE_LABEL)
            panel_axes.set_ylim(-0.02, 1.02)
            panel_axes.legend(loc="best", fontsize=8.5)
        axes[0].set_ylabel("share of runs above")
        return figure


def _draw_profile(axes: Axes, method: MethodScores, thresholds: Array, color: Any) -> None:
    """Draw one method's profile with its band."""
    share, low, high = method.compute_profile(thresholds)
    axes.fill_between(thresholds, low, high, color=color, alpha=0.15, lw=0, step="mid")
    axes.step(thresholds, share, color=color, lw=1.6, where="mid", label=method.name)


def _list_methods(aggregated: AggregatedScores) -> list[MethodScores]:
    """Return the methods, those of a group together. Raises ValueError without any."""
    if not aggregated.methods:
        raise ValueError(f"no method has a score in all tasks: {'; '.join(aggregated.omitted)}")
    groups = list(dict.fromkeys(method.group for method in aggregated.methods))
    return sorted(aggregated.methods, key=lambda method: groups.index(method.group))


def _choose_color(method: MethodScores, methods: Sequence[MethodScores]) -> Any:
    """Return the colour of the divergence; of baselines and of losses by their place in the group."""
    if method.group != BASELINES and "objectives" not in method.settings:
        return get_divergence_color(get_divergence(method.settings))
    names = [other.name for other in methods if other.group == method.group]
    return LINE_COLORS[names.index(method.name) % len(LINE_COLORS)]
