"""Summaries of a table: means with intervals over seeds, and the effect of lmbda."""

from collections.abc import Callable, Sequence
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
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.rows import encode_axis_value
from gkd_lab.tables.scores import select_scores

SEED_INTERVAL = "t, seeds"
EXAMPLE_INTERVAL = "bootstrap, examples"
NO_INTERVAL = "none"

SUMMARY_KEYS = ("role", "task", "lmbda", "divergence", "beta")
"""Columns that every summary has; the axes come after them."""

_OWN_COLUMNS = {"divergence", "beta"}
"""Columns that hold what a cell trained with, whatever an axis of that name says."""

StatisticsLookup = Callable[[str], ExampleStatistics | None]
"""Fingerprint -> statistics of what its model wrote; None where it was not stored."""


def expand_collapsed_cells(scores: pd.DataFrame) -> pd.DataFrame:
    """Return only the cells' rows of `select_scores`, a collapsed cell repeated at each of its grid points.

    A cell keeps its own divergence: one without a beta has one row, not one per beta.
    """
    cells = scores[scores["role"] == "cell"]
    collapsed = [isinstance(points, list) for points in cells["stands_for"]]
    if not any(collapsed):
        return cells.copy()
    rows = {
        (number, *point.items()): {**cell, **point}
        for number, cell in enumerate(cells.to_dict("records"))
        for point in _list_points(cell)
    }
    return pd.DataFrame(list(rows.values()), columns=scores.columns).astype(scores.dtypes)


def _list_points(cell: dict[Any, Any]) -> list[dict[str, Any]]:
    """Return the axis values that one cell's row takes at each grid point that it stands for."""
    points = cell["stands_for"] if isinstance(cell["stands_for"], list) else [{}]
    return [
        {
            axis: encode_axis_value(value)
            for axis, value in point.items()
            if axis in cell and axis not in _OWN_COLUMNS
        }
        for point in points
    ]


def expand_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return reference models' rows, then cells' rows with collapsed cells repeated per grid point."""
    return pd.concat([scores[scores["role"] != "cell"], expand_collapsed_cells(scores)])


def summary(table: pd.DataFrame, metric: str, evaluation: str | None = None) -> pd.DataFrame:
    """Return a frame with `mean`, `low`, `high`, `n`, `interval` of a metric per grid point, over seeds.

    Takes the long table; `metric` and `evaluation` are as in `select_scores`. A row per role, task, lmbda,
    divergence, beta and other axis; two teachers are two rows. `n` counts the finished seeds. From two seeds
    on, the interval is Student's t over seeds; for one it is the stored bootstrap over its examples;
    `interval` names the kind, or is `none`. Raises ConfigError for a score that the table has not.
    """
    return summarize_scores(select_scores(table, metric, evaluation))


def summarize_scores(scores: pd.DataFrame, axes: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the frame of `summary` of the rows of `select_scores`; `axes` None: `list_axes`."""
    axes = list_axes(scores) if axes is None else axes
    keys = [*SUMMARY_KEYS, *axes]
    rows = expand_table(scores)
    # Two teachers are not two seeds of one.
    model = rows["cell"].where(rows["role"] != "cell", "")
    groups = rows.assign(model=model).groupby([*keys, "model"], dropna=False, sort=False)
    summaries = [
        {**dict(zip(keys, values[:-1], strict=True)), **summarize_seeds(group)} for values, group in groups
    ]
    return pd.DataFrame(summaries, columns=[*keys, "mean", "low", "high", "n", "interval"])


def summarize_seeds(scores: pd.DataFrame) -> dict[str, Any]:
    """Return mean, low, high, n and interval kind of the scored rows of one grid point."""
    done = scores[scores["value"].notna()]
    values = [float(value) for value in done["value"]]
    low, high, kind = None, None, NO_INTERVAL
    if len(values) >= 2:
        (low, high), kind = compute_t_interval(values), SEED_INTERVAL
    elif values and done["low"].notna().all():
        low, high, kind = float(done["low"].iloc[0]), float(done["high"].iloc[0]), EXAMPLE_INTERVAL
    mean = float(np.mean(values)) if values else None
    return {"mean": mean, "low": low, "high": high, "n": len(values), "interval": kind}


def estimate_lmbda_effect(scores: pd.DataFrame, load_statistics: StatisticsLookup) -> Effect | None:
    """Return the mean difference of matched cells, largest minus smallest lmbda; None without a pair.

    Takes the rows of `select_scores`. Cells are paired on every other axis, and the differences averaged.
    The interval is Student's t over the seeds' means, or with one seed a bootstrap over its examples.
    """
    pairs = _pair_lmbda_ends(expand_collapsed_cells(scores))
    if pairs.empty:
        return None
    by_seed = pairs.groupby("seed")["difference"].mean().tolist()
    if len(by_seed) >= 2:
        return estimate_seed_effect(by_seed, len(pairs))
    before, after = ([load_statistics(cell) for cell in pairs[f"cell_{end}"]] for end in ("low", "high"))
    return estimate_one_seed_effect(float(np.mean(by_seed)), before, after)


def _pair_lmbda_ends(cells: pd.DataFrame) -> pd.DataFrame:
    """Return a row per pair of scored cells that differ only in lmbda, its smallest and largest.

    Columns `cell_low`, `cell_high` and `difference`; no row where all cells have one lmbda.
    """
    ends = cells["lmbda"].min(), cells["lmbda"].max()
    done = cells[cells["value"].notna()]
    keys = ["task", "divergence", "beta", "seed", *list_axes(cells)]
    low, high = (done[done["lmbda"] == end][[*keys, "cell", "value"]] for end in ends)
    pairs = low.merge(high, on=keys, suffixes=("_low", "_high"))
    pairs["difference"] = pairs["value_high"] - pairs["value_low"]
    return pairs if ends[0] < ends[1] else pairs.iloc[:0]
