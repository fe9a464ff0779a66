"""Scores of single test examples, and the samples of seeds and examples that intervals are made from."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gkd_lab.config import Grid
from gkd_lab.config.cell import AnyEvaluation
from gkd_lab.config.errors import ConfigError
from gkd_lab.statistics.noise import Array, ScoreSample
from gkd_lab.store import Record, Store
from gkd_lab.tables.example_statistics import compute_pseudo_values, load_example_statistics
from gkd_lab.tables.examples import EXAMPLE_COLUMNS
from gkd_lab.tables.results import name_evaluations

ScoreKey = tuple[str | None, str | None, str]
"""(cell, evaluation, metric) of one score."""
ExampleLookup = Callable[[ScoreKey], "ExampleScores | None"]
"""Score -> scores of its examples; None: not stored."""

SCORE_COLUMNS = ("cell", "evaluation", "metric", "value", "n_examples")
"""Columns of a score in a table."""
SCORE_TOLERANCE = 0.01
"""Points by which examples' mean may differ from their score; beyond it the metric has changed."""


@dataclass(frozen=True)
class ExampleScores:
    """Scores of N examples under one metric, sorted by id."""

    ids: NDArray[Any]
    """(N,) examples; models with equal ids are paired."""
    values: Array
    """(N,) points, whose mean is the score."""


@dataclass(frozen=True)
class SeedScore:
    """The score of one model under one seed."""

    value: float
    """Points."""
    reading_error: float = 0.0
    """Largest error of a number that was read off a figure of the paper."""
    key: ScoreKey | None = None
    """In a table."""
    start: str | None = None
    """Fingerprint of the SFT student that its cell started from."""
    example_count: int | None = None


def find_no_examples(key: ScoreKey) -> ExampleScores | None:
    """Return None: the lookup of a table without examples' scores."""
    return None


# ---- samples ----


def build_sample(
    table: Sequence[Sequence[SeedScore]], find_examples: ExampleLookup
) -> tuple[ScoreSample, str | None]:
    """Return (sample of M models over S seeds, reason why known examples are not used)."""
    values = np.array([[score.value for score in row] for row in table])
    examples, reason = _stack_examples(table, values, find_examples)
    counts = {score.example_count for row in table for score in row}
    count = counts.pop() if len(counts) == 1 else None
    return ScoreSample(values if examples is None else examples.mean(axis=2), examples, count), reason


def _stack_examples(
    table: Sequence[Sequence[SeedScore]], values: Array, find_examples: ExampleLookup
) -> tuple[Array | None, str | None]:
    """Return ((M, S, N) scores of examples, None), or (None, why they are not used; None: not known)."""
    keys = [score.key for row in table for score in row]
    lists = [None if key is None else find_examples(key) for key in keys]
    samples = [examples for examples in lists if examples is not None]
    if len(samples) < len(lists):
        return None, "some models without examples' scores" if samples else None
    if any(not np.array_equal(examples.ids, samples[0].ids) for examples in samples[1:]):
        return None, "models scored on different examples"
    if len(samples[0].ids) < 2:
        return None, "one example"
    stacked = np.array([examples.values for examples in samples]).reshape(*values.shape, -1)
    for scale in (1.0, 100.0):  # shares of 1 are points / 100
        if float(np.abs(scale * stacked.mean(axis=2) - values).max()) <= SCORE_TOLERANCE:
            return scale * stacked, None
    return None, "examples whose mean is not the stored score"


def average_groups(groups: Sequence[pd.DataFrame], find_examples: ExampleLookup) -> ScoreSample | None:
    """Return the sample of M groups of models over the seeds that all have: means over a group's models.

    A group holds rows of `select_scores`, all with a value and a seed. None: no seed in common.
    """
    pairs = [list(zip(group["seed"].tolist(), list_seed_scores(group), strict=True)) for group in groups]
    return average_seed_scores(pairs, find_examples)


def average_seed_scores(
    groups: Sequence[Sequence[tuple[int, SeedScore]]], find_examples: ExampleLookup
) -> ScoreSample | None:
    """Return `average_groups` of groups that hold (seed, score) of each of their models."""
    common_seeds = set.intersection(*({seed for seed, _ in group} for group in groups))
    if not common_seeds:
        return None
    seeds = sorted(common_seeds)
    groups = [[pair for pair in group if pair[0] in common_seeds] for group in groups]
    sample, _ = build_sample([[score] for group in groups for _, score in group], find_examples)
    values, examples = sample.seed_scores[:, 0], sample.example_scores
    if all(len(group) == len(seeds) for group in groups):  # one model for each seed: nothing to average
        order = _order_by_seed(groups)
        return ScoreSample(
            values[order], None if examples is None else examples[order, 0], sample.example_count
        )
    weights = _compute_group_weights(groups, seeds)
    return ScoreSample(
        weights @ values,
        None if examples is None else np.tensordot(weights, examples[:, 0], axes=1),
        sample.example_count,
    )


def _order_by_seed(groups: Sequence[Sequence[tuple[int, SeedScore]]]) -> NDArray[np.intp]:
    """Return (M, S) numbers of the rows of all groups, each group's sorted by seed."""
    seeds = np.array([[seed for seed, _ in group] for group in groups])
    first_rows = np.arange(len(groups)) * seeds.shape[1]
    return np.asarray(seeds.argsort(axis=1, kind="stable") + first_rows[:, None])


def _compute_group_weights(groups: Sequence[Sequence[tuple[int, SeedScore]]], seeds: Sequence[int]) -> Array:
    """Return (M, S, R) weights of the R rows of all groups: their means by group and seed."""
    group_of_row = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    seed_of_row = np.array([seed for group in groups for seed, _ in group])
    is_member = group_of_row == np.arange(len(groups))[:, None, None]
    is_member = is_member & (seed_of_row == np.array(seeds)[:, None])
    weights: Array = is_member / is_member.sum(axis=2, keepdims=True)
    return weights


def list_seed_scores(rows: pd.DataFrame) -> list[SeedScore]:
    """Return the score of each row of `select_scores`, with its key and its number of examples."""
    columns = [rows[name].tolist() for name in SCORE_COLUMNS]
    return [
        SeedScore(float(value), key=(cell, evaluation, metric), example_count=_get_count(count))
        for cell, evaluation, metric, value, count in zip(*columns, strict=True)
    ]


def _get_count(count: Any) -> int | None:
    """Return a number of examples; None for a missing one."""
    return None if pd.isna(count) else int(count)


# ---- lookups ----


def build_example_lookup(grid: Grid, store: Store) -> ExampleLookup:
    """Return a cached lookup of examples' scores in the stored predictions; None where there are none."""
    evaluations = _index_evaluations(grid, store)

    @cache
    def find_examples(key: ScoreKey) -> ExampleScores | None:
        """Load the scores of one model's examples under one evaluation and metric."""
        cell, evaluation, metric = key
        if (cell, evaluation) not in evaluations:
            return None
        statistics = load_example_statistics(*evaluations[cell, evaluation], metric)
        if statistics is None:
            return None
        return ExampleScores(np.arange(len(statistics)), compute_pseudo_values(statistics))

    return find_examples


def _index_evaluations(
    grid: Grid, store: Store
) -> Mapping[tuple[str | None, str | None], tuple[Record, AnyEvaluation]]:
    """Map (fingerprint, evaluation's name) to (record, evaluation); starts and teachers too."""
    index: dict[tuple[str | None, str | None], tuple[Record, AnyEvaluation]] = {}
    for cell in grid.cells:
        names = name_evaluations(cell.evaluations)
        start, teacher = cell.training.start, cell.training.teacher
        for fingerprint, record in (
            (cell.fingerprint, store.get_record(cell)),
            (start.fingerprint, store.get_artifact(cell.scale, "start", start)),
            (teacher.fingerprint, store.get_artifact(cell.scale, "teacher", teacher)),
        ):
            for evaluation in cell.evaluations:
                index[fingerprint, names[evaluation.folder]] = (record, evaluation)
    return index


def _list_ids(column: "pd.Series[Any]") -> NDArray[Any]:
    """Return examples' ids that can be sorted: numbers, or else text."""
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy()
    return column.astype("object").map(lambda value: None if pd.isna(value) else str(value)).to_numpy()


def index_examples(examples: pd.DataFrame | None) -> tuple[ExampleLookup, tuple[str, ...]]:
    """Return (lookup into a frame of examples' scores, problems that keep examples from being used).

    examples: columns `cell, evaluation, metric, example, value`; None: an empty lookup. A score's examples
    are sorted, so that models are paired by example. Raises ConfigError for missing columns.
    """
    if examples is None or not len(examples):
        return find_no_examples, ()
    names = EXAMPLE_COLUMNS[:5]
    missing = [name for name in names if name not in examples.columns]
    if missing:
        raise ConfigError(f"the examples have no column {', '.join(missing)}; they need {', '.join(names)}")
    lists: dict[ScoreKey, ExampleScores] = {}
    problems: Counter[str] = Counter()
    groups = examples.groupby(list(names[:3]), sort=False, dropna=False, observed=True)
    all_ids, all_values = _list_ids(examples["example"]), examples["value"].to_numpy(np.float64)
    for group, numbers in groups.indices.items():
        cell, evaluation, metric = [None if pd.isna(part) else part for part in list(group)]  # type: ignore[call-overload]
        ids, values = all_ids[numbers], all_values[numbers]
        if pd.isna(ids).any():
            problems["scores with examples without an id"] += 1
            continue
        if (ids[1:] < ids[:-1]).any():
            order = ids.argsort(kind="stable")
            ids, values = ids[order], values[order]
        if (ids[1:] == ids[:-1]).any():
            problems["scores with repeated examples"] += 1
        elif np.isnan(values).any():
            problems["scores with examples that have none"] += 1
        else:
            lists[cell, evaluation, str(metric)] = ExampleScores(ids, values)
    return lists.get, tuple(f"examples not used: {count} {text}" for text, count in problems.items())
