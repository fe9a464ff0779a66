"""Summaries of a table: means with intervals, the effect of lmbda, the span over divergences."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gkd_lab.statistics.example_scores import (
    ExampleLookup,
    SeedScore,
    average_groups,
    build_sample,
    find_no_examples,
    index_examples,
    list_seed_scores,
)
from gkd_lab.statistics.noise import (
    DIFFERENCE,
    EffectEstimate,
    ExtremePart,
    estimate_contrast,
    estimate_extreme,
)
from gkd_lab.tables.grouping import iterate_groups
from gkd_lab.tables.long_table import list_axes
from gkd_lab.tables.rows import encode_axis_value
from gkd_lab.tables.scores import select_scores

SEED_INTERVAL = "seeds"
EXAMPLE_INTERVAL = "examples"
CROSSED_INTERVAL = "seeds x examples"
NO_INTERVAL = "none"

SUMMARY_KEYS = ("role", "task", "lmbda", "divergence", "beta")
"""Columns that every summary has; the axes come after them."""

_OWN_COLUMNS = {"divergence", "beta"}
"""Columns that hold what a cell trained with, whatever an axis of that name says."""


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


def summary(
    table: pd.DataFrame, metric: str, evaluation: str | None = None, examples: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return a frame with `mean`, `low`, `high`, `n`, `interval` of a metric per grid point, over seeds.

    Takes the long table; `metric` and `evaluation` are as in `select_scores`. A row per role, task, lmbda,
    divergence, beta and other axis; two teachers are two rows. `n` counts the finished seeds. `low` and
    `high` are a 95 % interval, and `interval` says over what: `seeds` (Student's t) from two seeds on, `seeds
    x examples` (crossed) where `examples` (as `gkd_lab.tables.examples.read_examples` returns them) are
    given, `examples` (the stored bootstrap) for a single model, or `none`. Raises ConfigError for a score
    that the table has not.
    """
    find_examples, _ = index_examples(examples)
    return summarize_scores(select_scores(table, metric, evaluation), find_examples=find_examples)


def summarize_scores(
    scores: pd.DataFrame,
    axes: Sequence[str] | None = None,
    find_examples: ExampleLookup = find_no_examples,
) -> pd.DataFrame:
    """Return the frame of `summary` of the rows of `select_scores`; `axes` None: `list_axes`."""
    axes = list_axes(scores) if axes is None else axes
    keys = [*SUMMARY_KEYS, *axes]
    rows = expand_table(scores)
    # Two teachers are not two seeds of one; SFT students of one seed each are.
    has_seed = (rows["role"] == "cell") | ((rows["role"] == "start") & rows["seed"].notna())
    model = rows["cell"].mask(has_seed, "")
    models = list_scored_models(rows)
    summaries = [
        {
            **dict(zip(keys, values[:-1], strict=True)),
            **summarize_models([models[position] for position in positions], find_examples),
        }
        for values, positions in iterate_groups(rows.assign(model=model), [*keys, "model"])
    ]
    return pd.DataFrame(summaries, columns=[*keys, "mean", "low", "high", "n", "interval"])


class ScoredModel(NamedTuple):
    """Score of one model with its stored interval over examples; NaN for what is missing."""

    score: SeedScore
    low: float
    high: float


def list_scored_models(scores: pd.DataFrame) -> list[ScoredModel]:
    """Return the score of each row of `select_scores`, as `summarize_models` takes them."""
    bounds = (scores[name].astype("float64").tolist() for name in ("low", "high"))
    return list(map(ScoredModel, list_seed_scores(scores), *bounds))


def summarize_models(
    models: Sequence[ScoredModel], find_examples: ExampleLookup = find_no_examples
) -> dict[str, Any]:
    """Return mean, low, high, n and interval kind of the models of one grid point that have a score."""
    done = [model for model in models if not math.isnan(model.score.value)]
    values = [model.score.value for model in done]
    mean, low, high, kind = float(np.mean(values)) if done else None, None, None, NO_INTERVAL
    if len(done) >= 2:
        sample, _ = build_sample([[model.score for model in done]], find_examples)
        # A mean of few distinct scores is no difference that falls to either side by chance.
        estimate = estimate_contrast(replace(sample, example_count=None), np.ones(1))
        low, high = estimate.low(), estimate.high()
        if low is not None:
            kind = SEED_INTERVAL if estimate.examples is None else CROSSED_INTERVAL
    elif done and not math.isnan(done[0].low):
        low, high, kind = done[0].low, done[0].high, EXAMPLE_INTERVAL
    return {"mean": mean, "low": low, "high": high, "n": len(done), "interval": kind}


def estimate_lmbda_effect(
    scores: pd.DataFrame, find_examples: ExampleLookup
) -> tuple[EffectEstimate, int] | None:
    """Return (mean difference of matched cells, largest minus smallest lmbda; number of pairs), or None.

    Takes the rows of `select_scores`. Cells are paired on every other axis, and the differences averaged
    within each seed. None without a pair.
    """
    low, high = _pair_lmbda_ends(expand_collapsed_cells(scores))
    sample = average_groups([high, low], find_examples) if len(low) else None
    return None if sample is None else (estimate_contrast(sample, DIFFERENCE), len(low))


def _pair_lmbda_ends(cells: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (scored cells of the smallest lmbda, those of the largest), each with a partner of the other.

    No rows where all cells have one lmbda.
    """
    ends = cells["lmbda"].min(), cells["lmbda"].max()
    done = cells[cells["value"].notna() & (ends[0] < ends[1])]
    keys = ["task", "divergence", "beta", "seed", *list_axes(cells)]
    low, high = (done[done["lmbda"] == end] for end in ends)
    return low.merge(high[keys], on=keys), high.merge(low[keys], on=keys)


def estimate_best(groups: Sequence[pd.DataFrame], find_examples: ExampleLookup) -> EffectEstimate | None:
    """Estimate the largest mean of groups of scored models, without the bias of choosing it."""
    sample = average_groups(groups, find_examples)
    return None if sample is None else estimate_extreme(sample, [ExtremePart(1, np.eye(len(groups)))])


def estimate_span(groups: Sequence[pd.DataFrame], find_examples: ExampleLookup) -> EffectEstimate | None:
    """Estimate the largest minus the smallest mean of groups, without the bias of choosing them."""
    sample, rows = average_groups(groups, find_examples), np.eye(len(groups))
    parts = ExtremePart(1, rows), ExtremePart(1, -rows)
    return None if sample is None else estimate_extreme(sample, parts)
