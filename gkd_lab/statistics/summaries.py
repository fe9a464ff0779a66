"""Means and paired differences with intervals: over seeds, or over the examples of one seed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.statistics.bootstrap import ExampleStatistics, bootstrap_scores
from gkd_lab.statistics.effects import (
    SCORE_TOLERANCE,
    Effect,
    compute_t_interval,
    estimate_bootstrap_effect,
    estimate_seed_effect,
)
from gkd_lab.tables.rows import encode_axis_value
from gkd_lab.tables.table import list_axes

SEED_INTERVAL = "t, seeds"
EXAMPLE_INTERVAL = "bootstrap, examples"
NO_INTERVAL = "none"
PAIRED_BOOTSTRAP = "one seed, paired bootstrap over examples"

NO_BETA = math.inf
"""Where total variation stands among the divergences: it has no beta, and comes after reverse KL."""

StatisticsLookup = Callable[[str], ExampleStatistics | None]
"""Fingerprint -> what its model wrote, to be resampled; None where it was not kept."""


def expand_collapsed_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells, a row for each combination asked for: a collapsed cell stands at all its own.

    `beta` is `NO_BETA` for total variation, which stands there once and not at each beta.
    """
    cells = frame[frame["role"] == "cell"].to_dict("records")
    found = {
        (number, *place.items()): {**row, **place}
        for number, row in enumerate(cells)
        for place in _expand_cell(row)
    }
    return pd.DataFrame(list(found.values()), columns=frame.columns)


def _expand_cell(row: dict[Any, Any]) -> list[dict[str, Any]]:
    asked = row["stands_for"] if isinstance(row["stands_for"], list) else [{}]
    beta = NO_BETA if pd.isna(row["beta"]) else row["beta"]
    return [
        {**{name: encode_axis_value(value) for name, value in point.items() if name in row}, "beta": beta}
        for point in asked
    ]


def expand_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The reference models, then `points`."""
    return pd.concat([frame[frame["role"] != "cell"], expand_collapsed_cells(frame)])


def summary(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Per role, task, lmbda, beta and other axis: `mean`, `low`, `high`, `n` and `interval`.

    `n` counts the seeds that are done. From two seeds on, the interval is Student's t over seeds;
    for one it is the stored bootstrap over its examples; `interval` says which, or `none`. `beta` is
    `NO_BETA` for total variation.
    """
    keys = ["role", "task", "lmbda", "beta", *list_axes(frame)]
    rows = expand_table(frame)
    # Two teachers are not two seeds of one.
    model = rows["cell"].where(rows["role"] != "cell", "") if "cell" in rows else rows["role"]
    found = [
        {**dict(zip(keys, values[:-1], strict=True)), **_summarize_group(group, metric)}
        for values, group in rows.assign(model=model).groupby([*keys, "model"], dropna=False, sort=False)
    ]
    return pd.DataFrame(found, columns=[*keys, "mean", "low", "high", "n", "interval"])


def _summarize_group(group: pd.DataFrame, metric: str) -> dict[str, Any]:
    done = group[group[metric].notna()]
    values = [float(value) for value in done[metric]]
    low, high, kind = None, None, NO_INTERVAL
    if len(values) >= 2:
        (low, high), kind = compute_t_interval(values), SEED_INTERVAL
    elif values and f"{metric}.low" in done and done[f"{metric}.low"].notna().all():
        low, high = float(done[f"{metric}.low"].iloc[0]), float(done[f"{metric}.high"].iloc[0])
        kind = EXAMPLE_INTERVAL
    mean = float(np.mean(values)) if values else None
    return {"mean": mean, "low": low, "high": high, "n": len(values), "interval": kind}


def estimate_lmbda_effect(
    frame: pd.DataFrame, metric: str, load_statistics: StatisticsLookup
) -> Effect | None:
    """Score at the largest lmbda minus that at the smallest, averaged over all else; None: no pair.

    Cells are paired on every other axis. With two seeds or more the interval is t over the seeds'
    mean differences. With one it is a bootstrap over its examples, the same ones drawn for all cells.
    """
    pairs = _pair_lmbda_ends(expand_collapsed_cells(frame), metric)
    if pairs.empty:
        return None
    by_seed = pairs.groupby("seed")["difference"].mean().tolist()
    if len(by_seed) >= 2:
        return estimate_seed_effect(by_seed, len(pairs))
    mean = float(np.mean(by_seed))
    between = _estimate_example_effect(pairs, mean, load_statistics)
    return between or Effect(mean, None, None, len(pairs), "one seed, no interval")


def _pair_lmbda_ends(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a pair of cells that differ in lmbda only, at its two ends."""
    ends = cells["lmbda"].min(), cells["lmbda"].max()
    done = cells[cells[metric].notna()]
    keys = ["task", "beta", "seed", *list_axes(cells)]
    low, high = (done[done["lmbda"] == end][[*keys, "cell", metric]] for end in ends)
    pairs = low.merge(high, on=keys, suffixes=("_low", "_high"))
    pairs["difference"] = pairs[f"{metric}_high"] - pairs[f"{metric}_low"]
    return pairs if ends[0] < ends[1] else pairs.iloc[:0]


def _estimate_example_effect(
    pairs: pd.DataFrame, mean: float, load_statistics: StatisticsLookup
) -> Effect | None:
    ends = [[load_statistics(cell) for cell in pairs[f"cell_{end}"]] for end in ("low", "high")]
    found = [sample for end in ends for sample in end if sample is not None]
    if len(found) < 2 * len(pairs) or len({len(sample) for sample in found}) > 1:
        return None
    low, high = np.split(bootstrap_scores(found), 2)
    as_they_are = np.mean([one.score for one in found[len(pairs) :]]) - np.mean(
        [one.score for one in found[: len(pairs)]]
    )
    if abs(float(as_they_are) - mean) > SCORE_TOLERANCE:
        return None
    resampled = (high - low).mean(axis=0)
    return estimate_bootstrap_effect(mean, resampled, len(found[0]), len(pairs), PAIRED_BOOTSTRAP)
