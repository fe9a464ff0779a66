"""Means with intervals, and what an interval is over: seeds, or the examples of one seed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.metrics.intervals import mean_interval
from gkd_lab.results.rows import plain
from gkd_lab.results.table import axes_of

OVER_SEEDS = "t, seeds"
OVER_EXAMPLES = "bootstrap, examples"
NO_INTERVAL = "none"

NO_BETA = math.inf
"""Where total variation stands among the divergences: it has no beta, and comes after reverse KL."""

Interval = tuple[float, float]


def points(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells, a row for each combination asked for: a collapsed cell stands at all its own.

    `beta` is `NO_BETA` for total variation, which stands there once and not at each beta.
    """
    cells = frame[frame["role"] == "cell"].to_dict("records")
    found = {
        (number, *place.items()): {**row, **place}
        for number, row in enumerate(cells)
        for place in _places(row)
    }
    return pd.DataFrame(list(found.values()), columns=frame.columns)


def _places(row: dict[Any, Any]) -> list[dict[str, Any]]:
    asked = row["stands_for"] if isinstance(row["stands_for"], list) else [{}]
    beta = NO_BETA if pd.isna(row["beta"]) else row["beta"]
    return [
        {**{name: plain(value) for name, value in point.items() if name in row}, "beta": beta}
        for point in asked
    ]


def all_points(frame: pd.DataFrame) -> pd.DataFrame:
    """The reference models, then `points`."""
    return pd.concat([frame[frame["role"] != "cell"], points(frame)])


def summary(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Per role, task, lmbda, beta and other axis: `mean`, `low`, `high`, `n` and `interval`.

    `n` counts the seeds that are done. From two seeds on, the interval is Student's t over seeds;
    for one it is the stored bootstrap over its examples; `interval` says which, or `none`. `beta` is
    `NO_BETA` for total variation.
    """
    keys = ["role", "task", "lmbda", "beta", *axes_of(frame)]
    found = [
        {**dict(zip(keys, values, strict=True)), **_describe(group, metric)}
        for values, group in all_points(frame).groupby(keys, dropna=False, sort=False)
    ]
    return pd.DataFrame(found, columns=[*keys, "mean", "low", "high", "n", "interval"])


def t_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of at least two independent values (Student's t)."""
    from scipy.stats import t

    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * spread
    center = float(np.mean(values))
    return center - half, center + half


def _describe(group: pd.DataFrame, metric: str) -> dict[str, Any]:
    done = group[group[metric].notna()]
    values = [float(value) for value in done[metric]]
    low, high, kind = None, None, NO_INTERVAL
    if len(values) >= 2:
        (low, high), kind = t_interval(values), OVER_SEEDS
    elif values and f"{metric}.low" in done and done[f"{metric}.low"].notna().all():
        low, high = float(done[f"{metric}.low"].iloc[0]), float(done[f"{metric}.high"].iloc[0])
        kind = OVER_EXAMPLES
    mean = float(np.mean(values)) if values else None
    return {"mean": mean, "low": low, "high": high, "n": len(values), "interval": kind}


@dataclass(frozen=True)
class Effect:
    """A mean difference, its interval where there is one, and what was averaged."""

    mean: float
    low: float | None
    high: float | None
    pairs: int
    over: str

    @property
    def verdict(self) -> str:
        """`higher` or `lower` where the interval excludes 0, else `undecided`."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "higher" if self.low > 0 else "lower"


def lmbda_effect(
    frame: pd.DataFrame, metric: str, examples: Callable[[str], Sequence[float]]
) -> Effect | None:
    """Score at the largest lmbda minus that at the smallest, averaged over all else; None: no pair.

    Cells are paired on every other axis. With two seeds or more the interval is t over the seeds'
    mean differences. With one it is a bootstrap over its examples, which `examples(fingerprint)`
    gives in the order of the split; only for a metric that is the mean of its examples.
    """
    pairs = _pairs(points(frame), metric)
    if pairs.empty:
        return None
    by_seed = pairs.groupby("seed")["difference"].mean().tolist()
    mean = float(np.mean(by_seed))
    if len(by_seed) >= 2:
        return Effect(mean, *t_interval(by_seed), len(pairs), f"{len(by_seed)} seeds, Student's t")
    between = _example_interval(pairs, mean, examples)
    if between is None:
        return Effect(mean, None, None, len(pairs), "one seed, no interval")
    return Effect(mean, *between, len(pairs), "one seed, paired bootstrap over examples")


def _pairs(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a pair of cells that differ in lmbda only, at its two ends."""
    ends = cells["lmbda"].min(), cells["lmbda"].max()
    done = cells[cells[metric].notna()]
    keys = ["task", "beta", "seed", *axes_of(cells)]
    low, high = (done[done["lmbda"] == end][[*keys, "cell", metric]] for end in ends)
    pairs = low.merge(high, on=keys, suffixes=("_low", "_high"))
    pairs["difference"] = pairs[f"{metric}_high"] - pairs[f"{metric}_low"]
    return pairs if ends[0] < ends[1] else pairs.iloc[:0]


def _example_interval(
    pairs: pd.DataFrame, mean: float, examples: Callable[[str], Sequence[float]]
) -> Interval | None:
    differences = []
    for row in pairs.to_dict("records"):
        low, high = examples(row["cell_low"]), examples(row["cell_high"])
        if not len(low) or len(low) != len(high):
            return None
        differences.append(np.subtract(high, low))
    if len({len(one) for one in differences}) > 1:
        return None
    per_example = np.mean(differences, axis=0)
    if abs(float(per_example.mean()) - mean) > 1e-6:  # a corpus score is no mean of examples
        return None
    return mean_interval(per_example.tolist())
