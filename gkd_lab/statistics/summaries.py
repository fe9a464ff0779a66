"""Summaries of a table: means with intervals over seeds, and the effect of lmbda."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.statistics.effects import (
    Effect,
    compute_t_interval,
    estimate_one_seed_effect,
    estimate_seed_effect,
)
from gkd_lab.tables.example_statistics import ExampleStatistics
from gkd_lab.tables.rows import encode_axis_value
from gkd_lab.tables.table import list_wide_axes

SEED_INTERVAL = "t, seeds"
EXAMPLE_INTERVAL = "bootstrap, examples"
NO_INTERVAL = "none"

NO_BETA = math.inf
"""The beta of total variation, which has none: it sorts after reverse KL."""

StatisticsLookup = Callable[[str], ExampleStatistics | None]
"""Fingerprint -> statistics of what its model wrote; None where it was not stored."""


def expand_collapsed_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Return only the cells' rows, a collapsed cell repeated at each grid point it stands for.

    `beta` is `NO_BETA` for total variation, which has one row instead of one per beta.
    """
    cells = frame[frame["role"] == "cell"].to_dict("records")
    rows = {
        (number, *point.items()): {**cell, **point}
        for number, cell in enumerate(cells)
        for point in _list_points(cell)
    }
    return pd.DataFrame(list(rows.values()), columns=frame.columns)


def _list_points(cell: dict[Any, Any]) -> list[dict[str, Any]]:
    """Return the axis values, with beta, of each grid point that one cell's table row stands for."""
    points = cell["stands_for"] if isinstance(cell["stands_for"], list) else [{}]
    beta = NO_BETA if pd.isna(cell["beta"]) else cell["beta"]
    return [
        {**{axis: encode_axis_value(value) for axis, value in point.items() if axis in cell}, "beta": beta}
        for point in points
    ]


def expand_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return reference models' rows, then cells' rows with collapsed cells repeated per grid point."""
    return pd.concat([frame[frame["role"] != "cell"], expand_collapsed_cells(frame)])


def summary(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a frame with `mean`, `low`, `high`, `n`, `interval` of a metric per grid point, over seeds.

    A row per role, task, lmbda, beta and other axis; two teachers are two rows. `n` counts the finished
    seeds. From two seeds on, the interval is Student's t over seeds; for one it is the stored bootstrap over
    its examples; `interval` names the kind, or is `none`. `beta` is `NO_BETA` where a cell has none.
    """
    keys = ["role", "task", "lmbda", "beta", *list_wide_axes(frame)]
    rows = expand_table(frame)
    # Two teachers are not two seeds of one.
    model = rows["cell"].where(rows["role"] != "cell", "") if "cell" in rows else rows["role"]
    groups = rows.assign(model=model).groupby([*keys, "model"], dropna=False, sort=False)
    summaries = [
        {**dict(zip(keys, values[:-1], strict=True)), **_summarize_group(group, metric)}
        for values, group in groups
    ]
    return pd.DataFrame(summaries, columns=[*keys, "mean", "low", "high", "n", "interval"])


def _summarize_group(group: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Return mean, low, high, n and interval kind of the scored rows of one grid point."""
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
    """Return the mean difference of matched cells, largest minus smallest lmbda; None without a pair.

    Cells are paired on every other axis, and the differences averaged. The interval is Student's t over
    the seeds' means, or with one seed a bootstrap over its examples.
    """
    pairs = _pair_lmbda_ends(expand_collapsed_cells(frame), metric)
    if pairs.empty:
        return None
    by_seed = pairs.groupby("seed")["difference"].mean().tolist()
    if len(by_seed) >= 2:
        return estimate_seed_effect(by_seed, len(pairs))
    before, after = ([load_statistics(cell) for cell in pairs[f"cell_{end}"]] for end in ("low", "high"))
    return estimate_one_seed_effect(float(np.mean(by_seed)), before, after)


def _pair_lmbda_ends(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a row per pair of scored cells that differ only in lmbda, its smallest and largest.

    Columns `cell_low`, `cell_high` and `difference`; no row where all cells have one lmbda.
    """
    ends = cells["lmbda"].min(), cells["lmbda"].max()
    done = cells[cells[metric].notna()]
    keys = ["task", "beta", "seed", *list_wide_axes(cells)]
    low, high = (done[done["lmbda"] == end][[*keys, "cell", metric]] for end in ends)
    pairs = low.merge(high, on=keys, suffixes=("_low", "_high"))
    pairs["difference"] = pairs[f"{metric}_high"] - pairs[f"{metric}_low"]
    return pairs if ends[0] < ends[1] else pairs.iloc[:0]
