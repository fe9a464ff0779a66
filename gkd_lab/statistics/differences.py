"""Differences of all students from the SFT student that they started from, adjusted for their number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.statistics.effects import Effect, estimate_one_seed_effect, estimate_seed_effect
from gkd_lab.statistics.summaries import StatisticsLookup, expand_collapsed_cells
from gkd_lab.tables.long_table import list_axes

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class StartDifference:
    """The score at one grid point minus that of its SFT student."""

    axis_values: dict[str, Any]
    """`lmbda`, `divergence`, `beta` (NaN for a kind that has none) and the other axes."""
    effect: Effect
    adjusted_p_value: float | None
    """Holm's, over all differences of the list."""

    @property
    def verdict(self) -> str:
        """`higher` or `lower` by sign if the adjusted p-value is at most 0.05, else `undecided`."""
        if self.adjusted_p_value is None or self.adjusted_p_value > 1 - CONFIDENCE_LEVEL:
            return "undecided"
        return "higher" if self.effect.mean > 0 else "lower"


def compute_start_differences(
    scores: pd.DataFrame, load_statistics: StatisticsLookup
) -> list[StartDifference]:
    """Return score minus the SFT student's, one per grid point (all axes but seed) with a score.

    Takes the rows of `select_scores` of one task. From two seeds on a difference is taken over seeds, else
    paired over the examples of the one seed. Intervals are for one comparison; p-values and verdicts are
    adjusted for the number of differences with an interval.
    """
    estimates = list(_iterate_effects(scores, load_statistics))
    adjusted = iter(adjust_holm([effect.p for _, effect in estimates if effect.p is not None]))
    return [
        StartDifference(axis_values, effect, None if effect.p is None else next(adjusted))
        for axis_values, effect in estimates
    ]


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (1979), in the order of `p_values`."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return [float(p) for p in adjusted]


def _iterate_effects(
    scores: pd.DataFrame, load_statistics: StatisticsLookup
) -> Iterator[tuple[dict[str, Any], Effect]]:
    """Yield (axis values, effect: score minus the SFT student's) for each grid point with both."""
    starts = scores[scores["role"] == "start"].set_index("cell")["value"]
    keys = ["lmbda", "divergence", "beta", *list_axes(scores)]
    cells = expand_collapsed_cells(scores)
    cells = cells.assign(difference=cells["value"] - cells["start_cell"].map(starts))
    for values, group in cells[cells["difference"].notna()].groupby(keys, dropna=False, sort=False):
        differences = group["difference"].tolist()
        if len(differences) >= 2:
            effect = estimate_seed_effect(differences, len(differences))
        else:
            before, after = ([load_statistics(group[name].iloc[0])] for name in ("start_cell", "cell"))
            effect = estimate_one_seed_effect(differences[0], before, after)
        yield dict(zip(keys, values, strict=True)), effect
