"""Methods over all tasks: interquartile means and performance profiles (Agarwal et al. 2021)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gkd_lab.figures.layout import add_legend, create_axes, set_panel_title
from gkd_lab.figures.style import (
    INK,
    LINE_COLORS,
    METHOD_COLORS,
    MUTED,
    SMALL_SIZE,
    TEXT_WIDTH,
    apply_style,
    get_divergence_color,
)
from gkd_lab.statistics.aggregates import BASELINES, AggregatedScores, MethodScores, aggregate_scores
from gkd_lab.statistics.noise import Array
from gkd_lab.tables.divergences import get_divergence
from gkd_lab.tables.scores import select_primary_scores

THRESHOLDS = 200
MAX_RANGE = (-1.0, 2.0)
"""Normalised scores beyond which a profile is not drawn."""
_MAX_LISTED_GAPS = 3
SCORE_LABEL = "normalised score: 0 SFT student, 1 teacher"


def interquartile_means(table: pd.DataFrame, *, width: float | None = None) -> Figure:
    """Draw each method's mean of the middle half of its normalised scores, with a 95 % interval.

    Takes the long table, and of each task the first metric of its first evaluation. A row per method, or
    per lmbda and divergence. The interval covers the seeds of these tasks. `width` is in inches: None is
    the text of a page. Raises ValueError where no method has a score in all tasks.
    """
    return draw_interquartile_means(aggregate_scores(select_primary_scores(table)), width=width)


def profiles(table: pd.DataFrame, *, width: float | None = None) -> Figure:
    """Draw performance profiles: the share of a method's runs whose normalised score is above a threshold.

    Takes the long table, and of each task the first metric of its first evaluation. A panel for each of
    baselines, Supervised GKD and On-policy GKD, or for each lmbda; shaded are pointwise 95 % bands over the
    seeds of these tasks. `width` is in inches: None is the text of a page. Raises ValueError where no method
    has a score in all tasks.
    """
    return draw_profiles(aggregate_scores(select_primary_scores(table)), width=width)


def draw_interquartile_means(aggregated: AggregatedScores, *, width: float | None = None) -> Figure:
    """Draw `interquartile_means` of these scores. Raises ValueError without any."""
    methods = _list_methods(aggregated)
    with apply_style():
        figure, (axes,) = create_axes(1, 0.9 + 0.17 * len(methods), width=width or TEXT_WIDTH)
        estimates = [method.estimate_interquartile_mean() for method in methods]
        for y, (method, estimate) in enumerate(zip(methods, estimates, strict=True)):
            color = _choose_color(method, methods)
            low, high = estimate.low(), estimate.high()
            text = f"{estimate.effect:.2f}"
            if low is not None and high is not None:
                axes.barh(y, high - low, left=low, height=0.62, color=color, alpha=0.45, lw=0)
                text += f" [{low:.2f}, {high:.2f}]"
            axes.vlines(estimate.effect, y - 0.31, y + 0.31, color=color, lw=2.2)
            text = text.replace("-", "\N{MINUS SIGN}")
            axes.annotate(
                text, (1, y), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", color=INK, fontsize=SMALL_SIZE,
            )  # fmt: skip
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_yticks(range(len(methods)), [method.label for method in methods])
        axes.margins(x=0.03)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(SCORE_LABEL)
        set_panel_title(axes, "Interquartile mean", _describe_runs(aggregated))
        return figure


def _describe_runs(aggregated: AggregatedScores) -> str:
    """Return over how many tasks, or settings of one, and seeds the scores are, and the intervals' level."""
    seeds = sorted({scores.size for each in aggregated.methods for scores in each.strata})
    count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    text = f"{len(aggregated.tasks)} tasks \N{MULTIPLICATION SIGN} {count} seed{'s' if seeds[-1] > 1 else ''}"
    return f"{text}, 95 % over seeds" if seeds[-1] > 1 else f"{text}, no intervals"


def draw_profiles(aggregated: AggregatedScores, *, width: float | None = None) -> Figure:
    """Draw `profiles` of these scores. Raises ValueError without any."""
    methods = _list_methods(aggregated)
    groups = list(dict.fromkeys(method.group for method in methods))
    values = np.concatenate([scores for method in methods for scores in method.strata])
    low, high = np.clip([values.min(), values.max()], *MAX_RANGE)
    thresholds = np.linspace(min(low - 0.05, 0), max(high + 0.05, 1), THRESHOLDS)
    with apply_style():
        figure, axes = create_axes(len(groups), 2.2, panel_width=1.6, width=width or TEXT_WIDTH, sharey=True)
        for group, panel_axes in zip(groups, axes, strict=True):
            members = [method for method in methods if method.group == group]
            for method in members:
                _draw_profile(panel_axes, method, thresholds, _choose_color(method, methods))
            set_panel_title(panel_axes, group, _describe_runs(aggregated))
            panel_axes.set_xlabel(SCORE_LABEL.replace(": ", "\n"))
            panel_axes.set_ylim(-0.02, 1.02)
            if panel_axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
                panel_axes.set_ylabel("share of runs above")
        add_legend(figure, axes)
        return figure


def _draw_profile(axes: Axes, method: MethodScores, thresholds: Array, color: Any) -> None:
    """Draw one method's profile with its band."""
    share, low, high = method.compute_profile(thresholds)
    axes.fill_between(thresholds, low, high, color=color, alpha=0.15, lw=0, step="mid")
    axes.step(thresholds, share, color=color, lw=1.3, where="mid", label=method.name)


def _list_methods(aggregated: AggregatedScores) -> list[MethodScores]:
    """Return the methods, those of a group together. Raises ValueError without any."""
    if not aggregated.methods:
        raise ValueError(f"no method has a score in all tasks: {_describe_gaps(aggregated)}")
    groups = list(dict.fromkeys(method.group for method in aggregated.methods))
    return sorted(aggregated.methods, key=lambda method: groups.index(method.group))


def _describe_gaps(aggregated: AggregatedScores) -> str:
    """Return the number of missing scores and the first of them; without any, why tasks were left out."""
    gaps = aggregated.missing or aggregated.omitted
    kind = "missing scores" if aggregated.missing else "tasks left out"
    cut = ", the first" if len(gaps) > _MAX_LISTED_GAPS else ""
    return f"{kind} ({len(gaps)}){cut}: {'; '.join(gaps[:_MAX_LISTED_GAPS])}"


def _choose_color(method: MethodScores, methods: Sequence[MethodScores]) -> Any:
    """Return the colour of the divergence, of a baseline its own; of losses by their place in the group."""
    if method.group != BASELINES and "objectives" not in method.settings:
        return get_divergence_color(get_divergence(method.settings))
    if method.group == BASELINES and method.settings.get("method") in METHOD_COLORS:
        return METHOD_COLORS[method.settings["method"]]
    names = [other.name for other in methods if other.group == method.group]
    return LINE_COLORS[names.index(method.name) % len(LINE_COLORS)]
