"""Differences of all students from the SFT student that they started from, adjusted for their number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.statistics.example_scores import ExampleLookup, average_seed_scores, list_seed_scores
from gkd_lab.statistics.noise import DIFFERENCE, EffectEstimate, estimate_contrast
from gkd_lab.statistics.summaries import expand_collapsed_cells
from gkd_lab.tables.grouping import iterate_groups
from gkd_lab.tables.long_table import list_axes

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class StartDifference:
    """The score at one grid point minus that of its SFT student."""

    axis_values: dict[str, Any]
    """`lmbda`, `divergence`, `beta` (NaN for a kind that has none) and the other axes."""
    estimate: EffectEstimate
    adjusted_p_value: float | None
    """Holm's, over the differences of two seeds or more of the list; None: one seed, or no interval."""

    @property
    def verdict(self) -> str:
        """`higher` or `lower` by sign if the adjusted p-value is at most 0.05, else `undecided`."""
        if self.adjusted_p_value is None or self.adjusted_p_value > 1 - CONFIDENCE_LEVEL:
            return "undecided"
        return "higher" if self.estimate.effect > 0 else "lower"


def compute_start_differences(scores: pd.DataFrame, find_examples: ExampleLookup) -> list[StartDifference]:
    """Return score minus the SFT student's, one per grid point (all axes but seed) with a score.

    Takes the rows of `select_scores` of one task. Differences are paired by seed and by example, and
    intervals are for one comparison; p-values and verdicts are adjusted for the number of differences with
    two seeds or more. One seed decides nothing.
    """
    estimates = list(_iterate_estimates(scores, find_examples))
    p_values = [estimate.p_value if estimate.seeds > 1 else None for _, estimate in estimates]
    adjusted = iter(adjust_holm([p for p in p_values if p is not None]))
    return [
        StartDifference(axis_values, estimate, None if p is None else next(adjusted))
        for (axis_values, estimate), p in zip(estimates, p_values, strict=True)
    ]


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (1979), in the order of `p_values`."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return [float(p) for p in adjusted]


def _iterate_estimates(
    scores: pd.DataFrame, find_examples: ExampleLookup
) -> Iterator[tuple[dict[str, Any], EffectEstimate]]:
    """Yield (axis values, estimate of score minus the SFT student's) for each grid point with both."""
    starts = scores[(scores["role"] == "start") & scores["value"].notna()]
    keys = ["lmbda", "divergence", "beta", *list_axes(scores)]
    cells = expand_collapsed_cells(scores)
    cells = cells[cells["value"].notna() & cells["start_cell"].isin(starts["cell"])]
    start_scores = dict(zip(starts["cell"], list_seed_scores(starts), strict=True))
    starts_of_cells = [start_scores[fingerprint] for fingerprint in cells["start_cell"]]
    triples = list(zip(cells["seed"].tolist(), list_seed_scores(cells), starts_of_cells, strict=True))
    for values, positions in iterate_groups(cells, keys):
        group = [triples[position] for position in positions]
        pairs = [(seed, score) for seed, score, _ in group], [(seed, start) for seed, _, start in group]
        sample = average_seed_scores(pairs, find_examples)
        if sample is not None:
            yield dict(zip(keys, values, strict=True)), estimate_contrast(sample, DIFFERENCE)
