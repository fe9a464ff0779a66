"""Sentences on the effects of lmbda and beta, computed from the table."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from gkd_lab.statistics.differences import CONFIDENCE_LEVEL, StartDifference
from gkd_lab.statistics.summaries import (
    Effect,
    StatisticsLookup,
    estimate_lmbda_effect,
    summarize_scores,
)
from gkd_lab.tables.divergences import get_divergence, list_divergences, select_divergence
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.loss_labels import format_axis_setting


def describe_results(
    scores: pd.DataFrame, load_statistics: StatisticsLookup, start_differences: Sequence[StartDifference]
) -> list[str]:
    """Return four sentences: best cell, students against starts, effect of beta, effect of lmbda.

    Takes the rows of `select_scores` of one task. One sentence where no cell has a score.
    """
    summaries = summarize_scores(scores)
    cells = summaries[(summaries["role"] == "cell") & summaries["mean"].notna()]
    if cells.empty:
        return ["No cell of this task has a score yet, so the effects of λ and β are unknown."]
    effect = estimate_lmbda_effect(scores, load_statistics)
    axes = list_axes(scores)
    return [
        _describe_best(cells, summaries, axes),
        _describe_start_comparison(start_differences),
        _describe_beta_effect(cells, axes),
        _describe_lmbda_effect(scores, effect),
    ]


def describe_point(row: Any, axes: Sequence[str]) -> str:
    """Format `λ = 1, JSD(0.1), <other axes>`; with an axis `objectives` no divergence."""
    settings = [format_axis_setting(axis, row[axis]) for axis in axes]
    if "objectives" in axes:  # which include the divergence
        return ", ".join([f"λ = {row['lmbda']:g}", *settings])
    return ", ".join([f"λ = {row['lmbda']:g}", get_divergence(row).label, *settings])


def format_score(row: Any) -> str:
    """Format `93.2 [90.8, 95.1]`, without brackets where there is no interval."""
    interval = "" if row["interval"] == "none" else f" [{row['low']:.1f}, {row['high']:.1f}]"
    return f"{row['mean']:.1f}{interval}"


def _describe_best(cells: pd.DataFrame, summaries: pd.DataFrame, axes: list[str]) -> str:
    """Return a sentence on the cell with the highest mean and its distance from start and teacher."""
    best = cells.iloc[int(cells["mean"].argmax())]
    comparisons = []
    for role, name in (("start", "the SFT student"), ("teacher", "the teacher")):
        references = summaries[(summaries["role"] == role) & summaries["mean"].notna()]
        for axis in axes:  # where the reference depends on an axis, the one of the best cell
            references = references[references[axis].isna() | (references[axis] == best[axis])]
        if len(references) == 1:
            reference = references["mean"].iloc[0]
            word = "above" if best["mean"] >= reference else "below"
            comparisons.append(f"{abs(best['mean'] - reference):.1f} {word} {name} ({reference:.1f})")
    suffix = f", {' and '.join(comparisons)}" if comparisons else ""
    return f"Best of {len(cells)}: {describe_point(best, axes)} with {format_score(best)}{suffix}."


def _describe_start_comparison(start_differences: Sequence[StartDifference]) -> str:
    """Return a sentence that counts students higher and lower than their SFT student."""
    if not start_differences:
        return "No student can be compared with the SFT student that it started from."
    verdicts = [difference.verdict for difference in start_differences]
    count = {word: verdicts.count(word) for word in ("higher", "lower", "undecided")}
    if len(verdicts) == 1:
        return f"Against the SFT student that it started from, the one student is {verdicts[0]}."
    return (
        f"Against the SFT student that they started from, {count['higher']} of {len(verdicts)} students are "
        f"higher, {count['lower']} lower, {count['undecided']} undecided "
        f"({len(verdicts)} comparisons, Holm-adjusted at {CONFIDENCE_LEVEL:.0%})."
    )


def _describe_beta_effect(cells: pd.DataFrame, axes: list[str]) -> str:
    """Return a sentence on the span of scores over divergences at the largest lmbda."""
    lmbda = cells["lmbda"].max()
    rows = cells[cells["lmbda"] == lmbda]
    groups = {divergence: select_divergence(rows, divergence) for divergence in list_divergences(rows)}
    scores = {divergence: float(group["mean"].mean()) for divergence, group in groups.items()}
    if len(scores) < 2:
        return f"At λ = {lmbda:g} only one divergence has a score, so the effect of β is unknown."
    best, worst = max(scores, key=lambda name: scores[name]), min(scores, key=lambda name: scores[name])
    averaged = f", averaged over {', '.join(axes)}" if axes else ""
    overlap = "" if axes else _describe_overlap(groups[best].iloc[0], groups[worst].iloc[0])
    return (
        f"At λ = {lmbda:g} the {len(scores)} divergences span {scores[best] - scores[worst]:.1f}{averaged}: "
        f"from {scores[worst]:.1f} ({worst.label}) to {scores[best]:.1f} ({best.label}){overlap}."
    )


def _describe_overlap(best: "pd.Series[Any]", worst: "pd.Series[Any]") -> str:
    """Return `; their intervals overlap` or `do not overlap`; empty where one has no interval."""
    if pd.isna(best["low"]) or pd.isna(worst["high"]):
        return ""
    is_apart = best["low"] > worst["high"]
    return "; their intervals do not overlap" if is_apart else "; their intervals overlap"


def _describe_lmbda_effect(scores: pd.DataFrame, effect: Effect | None) -> str:
    """Return a sentence on the score at the largest minus that at the smallest lmbda."""
    lmbdas = scores["lmbda"].dropna()
    low, high = lmbdas.min(), lmbdas.max()
    if low == high:
        return f"All cells have λ = {low:g}, so the effect of λ is unknown."
    if effect is None:
        return f"No pair of cells at λ = {low:g} and {high:g} is done, so the effect of λ is unknown."
    interval = "" if effect.low is None else f" [{effect.low:+.1f}, {effect.high:+.1f}]"
    pairs = "1 pair" if effect.pairs == 1 else f"{effect.pairs} pairs"
    return (
        f"λ = {high:g} against λ = {low:g}: {effect.mean:+.1f}{interval} on average over {pairs} "
        f"of cells that differ in λ only: {effect.verdict} ({effect.over})."
    )
