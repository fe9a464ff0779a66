"""Every student against the SFT student that it started from: many comparisons, adjusted as such."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.statistics.bootstrap import bootstrap_scores
from gkd_lab.statistics.effects import (
    SCORE_TOLERANCE,
    Effect,
    estimate_bootstrap_effect,
    estimate_seed_effect,
)
from gkd_lab.statistics.summaries import PAIRED_BOOTSTRAP, StatisticsLookup, expand_collapsed_cells
from gkd_lab.tables.table import list_axes

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class StartDifference:
    """A place of the grid minus its start."""

    axis_values: dict[str, Any]
    """`lmbda`, `beta` (`NO_BETA` for total variation) and the other axes."""
    effect: Effect
    adjusted_p_value: float | None
    """Holm's, over all differences of the list."""

    @property
    def verdict(self) -> str:
        """`higher` or `lower` where that holds beside all the other comparisons, else `undecided`."""
        if self.adjusted_p_value is None or self.adjusted_p_value > 1 - CONFIDENCE_LEVEL:
            return "undecided"
        return "higher" if self.effect.mean > 0 else "lower"


def compute_start_differences(
    frame: pd.DataFrame, metric: str, task: str, load_statistics: StatisticsLookup
) -> list[StartDifference]:
    """One difference for each combination of lmbda, beta and the other axes with a score.

    From two seeds on over seeds, else paired over the examples of the one seed. Intervals are for one
    comparison; p-values and verdicts are adjusted for the number of differences with an interval.
    """
    places, effects = [], []
    for place, effect in _iterate_effects(frame[frame["task"] == task], metric, load_statistics):
        places.append(place)
        effects.append(effect)
    tested = [effect.p for effect in effects if effect.p is not None]
    adjusted = iter(adjust_holm(tested))
    return [
        StartDifference(place, effect, None if effect.p is None else next(adjusted))
        for place, effect in zip(places, effects, strict=True)
    ]


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the chance of any false one below `a` is at most `a`."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return [float(p) for p in adjusted]


def _iterate_effects(
    frame: pd.DataFrame, metric: str, load_statistics: StatisticsLookup
) -> Iterator[tuple[dict[str, Any], Effect]]:
    starts = frame[frame["role"] == "start"].set_index("cell")[metric]
    keys = ["lmbda", "beta", *list_axes(frame)]
    cells = expand_collapsed_cells(frame)
    scored = cells[cells[metric].notna() & cells["start_cell"].map(starts).notna()]
    for values, group in scored.groupby(keys, dropna=False, sort=False):
        by_seed = (group[metric] - group["start_cell"].map(starts)).tolist()
        first = group.iloc[0]
        if len(by_seed) >= 2:
            effect = estimate_seed_effect(by_seed, len(by_seed))
        else:
            effect = _estimate_one_seed_effect(
                first["cell"], first["start_cell"], by_seed[0], load_statistics
            )
        yield dict(zip(keys, values, strict=True)), effect


def _estimate_one_seed_effect(
    cell: str, start: str, difference: float, load_statistics: StatisticsLookup
) -> Effect:
    pair = [load_statistics(start), load_statistics(cell)]
    found = [sample for sample in pair if sample is not None]
    if len(found) < 2 or len(found[0]) != len(found[1]):
        return Effect(difference, None, None, 1, "one seed, no interval")
    if abs(found[1].score - found[0].score - difference) > SCORE_TOLERANCE:
        return Effect(difference, None, None, 1, "one seed, no interval")
    before, after = bootstrap_scores(found)
    return estimate_bootstrap_effect(difference, after - before, len(found[0]), 1, PAIRED_BOOTSTRAP)
