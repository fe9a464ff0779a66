"""Sentences on the effects of lmbda and beta, computed from the table."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from gkd_lab.statistics.differences import CONFIDENCE_LEVEL, StartDifference
from gkd_lab.statistics.example_scores import SCORE_COLUMNS, ExampleLookup
from gkd_lab.statistics.noise import MIN_SEEDS_EXTREME, EffectEstimate
from gkd_lab.statistics.summaries import (
    NO_INTERVAL,
    estimate_best,
    estimate_lmbda_effect,
    estimate_span,
    expand_collapsed_cells,
    summarize_scores,
)
from gkd_lab.tables.divergences import get_divergence, list_divergences, select_divergence
from gkd_lab.tables.grouping import iterate_groups
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.loss_labels import format_axis_setting


def describe_results(
    scores: pd.DataFrame, find_examples: ExampleLookup, start_differences: Sequence[StartDifference]
) -> list[str]:
    """Return four sentences: best cell, students against starts, effect of beta, effect of lmbda.

    Takes the rows of `select_scores` of one task. One sentence where no cell has a score.
    """
    summaries = summarize_scores(scores, find_examples=find_examples)
    if summaries.loc[summaries["role"] == "cell", "mean"].isna().all():
        return ["No cell of this task has a score yet, so the effects of λ and β are unknown."]
    axes = list_axes(scores)
    cells = expand_collapsed_cells(scores)
    cells = cells[cells["value"].notna()]
    return [
        f"{_describe_best(summaries, axes)}{_describe_best_bias(cells, axes, find_examples)}.",
        _describe_start_comparison(start_differences),
        _describe_beta_effect(cells, axes, find_examples),
        _describe_lmbda_effect(scores, find_examples),
    ]


def describe_point(row: Any, axes: Sequence[str]) -> str:
    """Format `λ = 1, JSD(0.1), <other axes>`; with an axis `objectives` no divergence."""
    settings = [format_axis_setting(axis, row[axis]) for axis in axes]
    if "objectives" in axes:  # which include the divergence
        return ", ".join([f"λ = {row['lmbda']:g}", *settings])
    return ", ".join([f"λ = {row['lmbda']:g}", get_divergence(row).label, *settings])


def format_score(row: Any) -> str:
    """Format `93.2 [90.8, 95.1] over <what the interval covers>`, `93.2` where there is no interval."""
    if row["interval"] == NO_INTERVAL:
        return f"{row['mean']:.1f}"
    return f"{row['mean']:.1f} [{row['low']:.1f}, {row['high']:.1f}] over {row['interval']}"


def format_estimate(estimate: EffectEstimate) -> str:
    """Format `+1.2 [+0.4, +2.0]`, `+1.2` without interval."""
    low, high = estimate.low(), estimate.high()
    interval = "" if low is None or high is None else f" [{low:+.1f}, {high:+.1f}]"
    return f"{estimate.effect:+.1f}{interval}"


def _describe_best(summaries: pd.DataFrame, axes: list[str]) -> str:
    """Return a text on the cell with the highest mean and its distance from start and teacher."""
    cells = summaries[(summaries["role"] == "cell") & summaries["mean"].notna()]
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
    return f"Best of {len(cells)}: {describe_point(best, axes)} with {format_score(best)}{suffix}"


def _describe_best_bias(cells: pd.DataFrame, axes: list[str], find_examples: ExampleLookup) -> str:
    """Return `; 79.4 [...] without the bias of choosing ...`; empty for one cell or too few seeds."""
    keys = ["lmbda", "divergence", "beta", *axes]
    rows = cells[["seed", *SCORE_COLUMNS]]  # taking them from fewer columns is faster
    groups = [rows.iloc[positions] for _, positions in iterate_groups(cells, keys)]
    estimate = estimate_best(groups, find_examples) if len(groups) > 1 else None
    low, high = (None, None) if estimate is None else (estimate.low(), estimate.high())
    if estimate is None or low is None or high is None:
        return ""
    return f"; {estimate.effect:.1f} [{low:.1f}, {high:.1f}] without the bias of choosing the best"


def _describe_start_comparison(start_differences: Sequence[StartDifference]) -> str:
    """Return a sentence that counts students higher and lower than their SFT student."""
    if not start_differences:
        return "No student can be compared with the SFT student that it started from."
    if all(difference.estimate.seeds < 2 for difference in start_differences):
        return (
            "One seed does not decide whether a student is higher than the SFT student that it started from."
        )
    verdicts = [difference.verdict for difference in start_differences]
    count = {word: verdicts.count(word) for word in ("higher", "lower", "undecided")}
    if len(verdicts) == 1:
        return f"Against the SFT student that it started from, the one student is {verdicts[0]}."
    return (
        f"Against the SFT student that they started from, {count['higher']} of {len(verdicts)} students are "
        f"higher, {count['lower']} lower, {count['undecided']} undecided "
        f"({len(verdicts)} comparisons, Holm-adjusted at {CONFIDENCE_LEVEL:.0%})."
    )


def _describe_beta_effect(cells: pd.DataFrame, axes: list[str], find_examples: ExampleLookup) -> str:
    """Return a sentence on the span of scores over divergences at the largest lmbda."""
    lmbda = cells["lmbda"].max()
    rows = cells[cells["lmbda"] == lmbda]
    groups = {divergence: select_divergence(rows, divergence) for divergence in list_divergences(rows)}
    if len(groups) < 2:
        return f"At λ = {lmbda:g} only one divergence has a score, so the effect of β is unknown."
    means = {divergence: float(group["value"].mean()) for divergence, group in groups.items()}
    best, worst = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
    averaged = f", averaged over {', '.join(axes)}" if axes else ""
    return (
        f"At λ = {lmbda:g} the {len(means)} divergences span {means[best] - means[worst]:.1f}{averaged}: "
        f"from {means[worst]:.1f} ({worst.label}) to {means[best]:.1f} ({best.label}); "
        f"{_describe_span_bias(estimate_span(list(groups.values()), find_examples))}."
    )


def _describe_span_bias(span: EffectEstimate | None) -> str:
    """Return the span without the bias of choosing its ends, or that there are too few seeds."""
    if span is None or span.standard_error is None:
        return f"fewer than {MIN_SEEDS_EXTREME} seeds do not tell how much of it is chance"
    return f"{format_estimate(span)} if chance is removed ({span.method})"


def _describe_lmbda_effect(scores: pd.DataFrame, find_examples: ExampleLookup) -> str:
    """Return a sentence on the score at the largest minus that at the smallest lmbda."""
    lmbdas = scores["lmbda"].dropna()
    low, high = lmbdas.min(), lmbdas.max()
    if low == high:
        return f"All cells have λ = {low:g}, so the effect of λ is unknown."
    effect = estimate_lmbda_effect(scores, find_examples)
    if effect is None:
        return (
            f"No pair of cells at λ = {low:g} and {high:g} that differ in nothing else is done, so the "
            "effect of λ is unknown."
        )
    estimate, count = effect
    return (
        f"λ = {high:g} against λ = {low:g}: {format_estimate(estimate)} on average over {count} "
        f"{'pair' if count == 1 else 'pairs'} of cells that differ in λ only: {estimate.verdict} "
        f"({estimate.method})."
    )


MAX_NAMED_CELLS = 5


def describe_missing_cells(parts: Sequence[pd.DataFrame]) -> list[str]:
    """Return a line per task whose cells lack a score: how many, the first five by name, with their states.

    Takes the rows of `select_scores` of each task.
    """
    lines = []
    for scores in parts:
        cells = scores[scores["role"] == "cell"]
        missing = cells[cells["value"].isna()]
        if len(missing):
            axes = list_axes(scores)
            names = [
                f"{describe_point(row, axes)}, seed {row['seed']} ({row['status']})"
                for row in missing[:MAX_NAMED_CELLS].to_dict("records")
            ]
            rest = f"; and {len(missing) - len(names)} more" if len(missing) > len(names) else ""
            task = scores["task"].iloc[0]
            lines.append(
                f"{task}: {len(missing)} of {len(cells)} cells have no score: {'; '.join(names)}{rest}"
            )
    return lines
