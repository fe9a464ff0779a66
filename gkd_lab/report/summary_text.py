"""What lmbda and beta did, in plain sentences computed from the table."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from gkd_lab.statistics.differences import CONFIDENCE_LEVEL, StartDifference
from gkd_lab.statistics.summaries import Effect, StatisticsLookup, estimate_lmbda_effect, summary
from gkd_lab.tables.loss_labels import divergence_label, format_axis_setting
from gkd_lab.tables.table import list_axes


def describe_results(
    frame: pd.DataFrame,
    metric: str,
    task: str,
    samples: StatisticsLookup,
    start_differences: Sequence[StartDifference],
) -> list[str]:
    """Best cell, who is better than its start, range over beta, effect of lmbda; gaps are said."""
    here = frame[frame["task"] == task]
    described = summary(here, metric)
    cells = described[(described["role"] == "cell") & described["mean"].notna()]
    if cells.empty:
        return ["No cell of this task has a score yet, so there is nothing to say about λ or β."]
    effect = estimate_lmbda_effect(here, metric, samples)
    return [
        _describe_best(cells, described, list_axes(frame)),
        _describe_start_comparison(start_differences),
        _describe_beta_effect(cells, list_axes(frame)),
        _describe_lmbda_effect(here, effect),
    ]


def describe_point(row: Any, axes: Sequence[str]) -> str:
    """`λ = 1, JSD(0.1)`, with the other axes' values."""
    if "objectives" in axes:  # whose first divergence says itself
        return ", ".join([f"λ = {row['lmbda']:g}", *(format_axis_setting(axis, row[axis]) for axis in axes)])
    others = [format_axis_setting(axis, row[axis]) for axis in axes]
    return ", ".join([f"λ = {row['lmbda']:g}", divergence_label(row["beta"]), *others])


def format_score(row: Any) -> str:
    """`93.2 [90.8, 95.1]`, without brackets where there is no interval."""
    ends = "" if row["interval"] == "none" else f" [{row['low']:.1f}, {row['high']:.1f}]"
    return f"{row['mean']:.1f}{ends}"


def _describe_best(cells: pd.DataFrame, summaries: pd.DataFrame, axes: list[str]) -> str:
    best = cells.iloc[int(cells["mean"].argmax())]
    compared = []
    for role, name in (("start", "the SFT student"), ("teacher", "the teacher")):
        known = summaries[(summaries["role"] == role) & summaries["mean"].notna()]
        for axis in axes:  # where the reference depends on an axis, the one of the best cell
            known = known[known[axis].isna() | (known[axis] == best[axis])]
        if len(known) == 1:
            difference = best["mean"] - known["mean"].iloc[0]
            word = "above" if difference >= 0 else "below"
            compared.append(f"{abs(difference):.1f} {word} {name} ({known['mean'].iloc[0]:.1f})")
    against = f", {' and '.join(compared)}" if compared else ""
    return f"Best of {len(cells)}: {describe_point(best, axes)} with {format_score(best)}{against}."


def _describe_start_comparison(differences: Sequence[StartDifference]) -> str:
    if not differences:
        return "No student can be compared with the SFT student that it started from."
    verdicts = [one.verdict for one in differences]
    count = {word: verdicts.count(word) for word in ("higher", "lower", "undecided")}
    if len(verdicts) == 1:
        return f"Against the SFT student that it started from, the one student is {verdicts[0]}."
    return (
        f"Against the SFT student that they started from, {count['higher']} of {len(verdicts)} students are "
        f"higher, {count['lower']} lower, {count['undecided']} undecided "
        f"({len(verdicts)} comparisons, Holm-adjusted at {CONFIDENCE_LEVEL:.0%})."
    )


def _describe_beta_effect(cells: pd.DataFrame, axes: list[str]) -> str:
    top = cells["lmbda"].max()
    there = cells[cells["lmbda"] == top].groupby("beta")["mean"].mean()
    if len(there) < 2:
        return f"At λ = {top:g} one divergence only has a score, so nothing is said about β."
    best, least = there.idxmax(), there.idxmin()
    averaged = f", averaged over {', '.join(axes)}" if axes else ""
    overlap = _describe_overlap(cells[cells["lmbda"] == top], best, least) if not axes else ""
    return (
        f"At λ = {top:g} the {len(there)} divergences span "
        f"{there[best] - there[least]:.1f}{averaged}: from {there[least]:.1f} "
        f"({divergence_label(least)}) to {there[best]:.1f} ({divergence_label(best)}){overlap}."
    )


def _describe_overlap(cells: pd.DataFrame, best_beta: float, worst_beta: float) -> str:
    upper, lower = (cells[cells["beta"] == beta].iloc[0] for beta in (best_beta, worst_beta))
    if pd.isna(upper["low"]) or pd.isna(lower["high"]):
        return ""
    apart = upper["low"] > lower["high"]
    return "; their intervals do not overlap" if apart else "; their intervals overlap"


def _describe_lmbda_effect(frame: pd.DataFrame, effect: Effect | None) -> str:
    lmbdas = frame["lmbda"].dropna()
    low, high = lmbdas.min(), lmbdas.max()
    if low == high:
        return f"λ = {low:g} only, so nothing is said about λ."
    if effect is None:
        return f"No pair of cells at λ = {low:g} and {high:g} is done, so nothing is said about λ."
    ends = "" if effect.low is None else f" [{effect.low:+.1f}, {effect.high:+.1f}]"
    pairs = "1 pair" if effect.pairs == 1 else f"{effect.pairs} pairs"
    return (
        f"λ = {high:g} against λ = {low:g}: {effect.mean:+.1f}{ends} on average over {pairs} "
        f"of cells that differ in λ only: {effect.verdict} ({effect.over})."
    )
