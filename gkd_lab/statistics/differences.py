"""Every student against the SFT student that it started from: many comparisons, adjusted as such."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.statistics.bootstrap import bootstrap
from gkd_lab.statistics.effects import SAME, Effect, over_examples, over_seeds
from gkd_lab.statistics.summaries import PAIRED, Samples, points
from gkd_lab.tables.table import axes_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A place of the grid minus its start."""

    place: dict[str, Any]
    """`lmbda`, `beta` (`NO_BETA` for total variation) and the other axes."""
    effect: Effect
    adjusted_p: float | None
    """Holm's, over all differences of the list."""

    @property
    def verdict(self) -> str:
        """`higher` or `lower` where that holds beside all the other comparisons, else `undecided`."""
        if self.adjusted_p is None or self.adjusted_p > 1 - CONFIDENCE:
            return "undecided"
        return "higher" if self.effect.mean > 0 else "lower"


def against_start(frame: pd.DataFrame, metric: str, task: str, samples: Samples) -> list[Difference]:
    """One difference for each combination of lmbda, beta and the other axes with a score.

    From two seeds on over seeds, else paired over the examples of the one seed. Intervals are for one
    comparison; p-values and verdicts are adjusted for the number of differences with an interval.
    """
    places, effects = [], []
    for place, effect in _effects(frame[frame["task"] == task], metric, samples):
        places.append(place)
        effects.append(effect)
    tested = [effect.p for effect in effects if effect.p is not None]
    adjusted = iter(holm(tested))
    return [
        Difference(place, effect, None if effect.p is None else next(adjusted))
        for place, effect in zip(places, effects, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the chance of any false one below `a` is at most `a`."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return [float(p) for p in adjusted]


def _effects(frame: pd.DataFrame, metric: str, samples: Samples) -> Iterator[tuple[dict[str, Any], Effect]]:
    starts = frame[frame["role"] == "start"].set_index("cell")[metric]
    keys = ["lmbda", "beta", *axes_of(frame)]
    cells = points(frame)
    scored = cells[cells[metric].notna() & cells["start_cell"].map(starts).notna()]
    for values, group in scored.groupby(keys, dropna=False, sort=False):
        by_seed = (group[metric] - group["start_cell"].map(starts)).tolist()
        first = group.iloc[0]
        if len(by_seed) >= 2:
            effect = over_seeds(by_seed, len(by_seed))
        else:
            effect = _one_seed(first["cell"], first["start_cell"], by_seed[0], samples)
        yield dict(zip(keys, values, strict=True)), effect


def _one_seed(cell: str, start: str, difference: float, samples: Samples) -> Effect:
    pair = [samples(start), samples(cell)]
    found = [sample for sample in pair if sample is not None]
    if len(found) < 2 or len(found[0]) != len(found[1]):
        return Effect(difference, None, None, 1, "one seed, no interval")
    if abs(found[1].value - found[0].value - difference) > SAME:
        return Effect(difference, None, None, 1, "one seed, no interval")
    before, after = bootstrap(found)
    return over_examples(difference, after - before, len(found[0]), 1, PAIRED)
