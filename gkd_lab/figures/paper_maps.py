"""A run's lmbda x beta scores paired with the paper's heat map, and how far the two agree.

A panel of the run meets the heat map of its task and decoding: Figures 6, 7, A.12 to A.14.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.claims import paper
from gkd_lab.claims.model_scores import ComparedModel, ModelScores
from gkd_lab.claims.model_settings import Settings, find_distinguishing_settings, format_settings

GridPoint = tuple[float, float]
"""(lmbda, beta)"""
Array = np.ndarray[Any, Any]

MIN_COMMON_CELLS = 4
"""Cells in common below which two maps are not worth comparing."""
RESAMPLES = 2000
_MAP_SETTINGS = ("lmbda", "beta", "loss", "role", "alpha", "anchor")
"""Settings that vary within a map, not between maps."""


@dataclass(frozen=True)
class MapPair:
    """One panel of the run and the paper's map of the same task."""

    title: str
    paper_figure: str
    students: str
    """Students of the paper's numbers: a size, or the mean of several."""
    run_values: Mapping[GridPoint, float]
    paper_values: Mapping[GridPoint, float]
    min_difference: float
    """Two of the paper's cells are told apart if they differ by more than this."""
    is_gain: bool
    """Improvements over the start; else differences from the mean, where the paper states no start."""

    @property
    def common_points(self) -> list[GridPoint]:
        """Sorted (lmbda, beta) points that have a value in both maps."""
        return sorted(self.run_values.keys() & self.paper_values.keys())


@dataclass(frozen=True)
class Agreement:
    """Agreement of two maps over their common cells."""

    cells: int
    same_sign: int
    """Cells whose improvement over the start has the same sign."""
    same_order: int
    """Of `pairs` of cells that the paper tells apart, how many stand in the same order."""
    pairs: int
    correlation: float
    """Spearman's, over the cells; NaN where all are equal."""
    low: float
    high: float
    """95 %, by a bootstrap over the cells."""


def pair_maps(scores: ModelScores, task: str) -> list[MapPair]:
    """Return a pair per panel of a task whose paper map shares at least four points with it."""
    panels: dict[str, list[ComparedModel]] = {}
    for model in scores.where(task=task).models:
        context = str([item for item in model.settings.items() if item[0] not in _MAP_SETTINGS])
        panels.setdefault(context, []).append(model)
    distinct = find_distinguishing_settings([panel[0].settings for panel in panels.values()])
    names = ["task", *(name for name in distinct if name not in _MAP_SETTINGS)]
    pairs = [_build_pair(panel, format_settings(panel[0].settings, names)) for panel in panels.values()]
    return [pair for pair in pairs if pair is not None and len(pair.common_points) >= MIN_COMMON_CELLS]


def _build_pair(panel: Sequence[ComparedModel], title: str) -> MapPair | None:
    """Pair one panel with the paper's map; None where the paper has none.

    Values are gains over the start where both state one, else differences from the mean.
    """
    rows, students = _select_paper_rows(panel[0].settings)
    if rows.empty:
        return None
    is_stated_gain = bool(rows["gain"].notna().all())
    paper_values = _average_paper_rows(rows, "gain" if is_stated_gain else "value")
    run_values, start = _average_cells(panel), _average_start(panel)
    is_gain = is_stated_gain and start is not None
    if start is not None and is_gain:
        run_values = {point: value - start for point, value in run_values.items()}
    else:
        run_values, paper_values = (
            _center_values(run_values, paper_values),
            _center_values(paper_values, run_values),
        )
    return MapPair(
        title=title,
        paper_figure=" and ".join(rows["figure"].unique()),
        students=students,
        run_values=run_values,
        paper_values=paper_values,
        min_difference=2 * float(rows["error"].max()),
        is_gain=is_gain,
    )


def _center_values(
    values: Mapping[GridPoint, float], other_values: Mapping[GridPoint, float]
) -> dict[GridPoint, float]:
    """Return all values minus their mean over the points that both maps have."""
    common = values.keys() & other_values.keys()
    mean = float(np.mean([values[point] for point in common])) if common else 0.0
    return {point: value - mean for point, value in values.items()}


def _average_cells(panel: Sequence[ComparedModel]) -> dict[GridPoint, float]:
    """Return (lmbda, beta) -> mean score over seeds; only JSD cells count, unfinished ones do not."""
    return {
        (model["lmbda"], model["beta"]): float(np.mean([score.value for score in model.scores.values()]))
        for model in panel
        if model["role"] == "cell" and model["loss"] == "jsd" and model.scores
    }


def _average_start(panel: Sequence[ComparedModel]) -> float | None:
    """Return the mean of the SFT students' scores over seeds; None without one."""
    starts = [model for model in panel if model["role"] == "start"]
    values = [score.value for start in starts for score in start.scores.values()]
    return float(np.mean(values)) if values else None


def _select_paper_rows(settings: Settings) -> tuple[pd.DataFrame, str]:
    """Return (paper rows of a task and decoding, their sizes): of the same student, else of all."""
    rows = paper.load_values()
    rows = rows[rows["figure"].isin(_list_paper_figures(settings)) & (rows["role"] == "cell")]
    sizes = [str(size) for size in rows["student"].unique()]
    selected = [size for size in sizes if size == settings.get("student")] or sizes
    students = selected[0] if len(selected) == 1 else f"mean of {', '.join(selected)}"
    return rows[rows["student"].isin(selected)], students


def _list_paper_figures(settings: Settings) -> tuple[str, ...]:
    """Return the paper's heat-map figures of a task and decoding; none where it has no such map."""
    task = settings["task"]
    if task == "summarization" and settings.get("decoding") == "sample":
        return ("A.12",) if settings.get("temperature") == 1.0 else ()
    figures = {"summarization": ("A.13",), "translation": ("6",), "arithmetic": ("7", "A.14")}
    return figures.get(task, ())


def _average_paper_rows(rows: pd.DataFrame, column: str) -> dict[GridPoint, float]:
    """Return (lmbda, beta) -> mean over the student sizes of one column of the paper's numbers."""
    means = rows.groupby(["lmbda", "beta"], as_index=False)[[column]].mean().to_dict("records")
    return {(float(row["lmbda"]), float(row["beta"])): float(row[column]) for row in means}


def measure_agreement(pair: MapPair, seed: int = 0) -> Agreement:
    """Return counts of equal signs and orders over the common points, and their rank correlation.

    `seed` is of the bootstrap that gives the correlation's interval.
    """
    points = pair.common_points
    run_array = np.array([pair.run_values[point] for point in points])
    paper_array = np.array([pair.paper_values[point] for point in points])
    distinct_pairs = [
        (a, b)
        for a, b in combinations(range(len(points)), 2)
        if abs(paper_array[a] - paper_array[b]) > pair.min_difference - 1e-9
    ]
    same_order = sum(
        (run_array[a] - run_array[b]) * (paper_array[a] - paper_array[b]) > 0 for a, b in distinct_pairs
    )
    low, high = _bootstrap_spearman(run_array, paper_array, seed)
    return Agreement(
        cells=len(points),
        same_sign=int(np.sum(np.sign(run_array) == np.sign(paper_array))),
        same_order=int(same_order),
        pairs=len(distinct_pairs),
        correlation=_compute_spearman(run_array, paper_array),
        low=low,
        high=high,
    )


def _compute_spearman(a: Array, b: Array) -> float:
    """Return Spearman's rank correlation; NaN where one side is constant."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return float("nan")
    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def _bootstrap_spearman(a: Array, b: Array, seed: int) -> tuple[float, float]:
    """Return (low, high), the 95 % interval of the rank correlation by resampling cells; or NaN."""
    indices = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    ranks = pd.DataFrame(a[indices]).rank(axis=1), pd.DataFrame(b[indices]).rank(axis=1)
    correlations = ranks[0].corrwith(ranks[1], axis=1).dropna()
    if correlations.empty:
        return float("nan"), float("nan")
    low, high = np.percentile(correlations, [2.5, 97.5])
    return float(low), float(high)


def describe_agreement(pair: MapPair) -> Iterator[str]:
    """Yield sentences on a pair's equal signs (gains only), equal orders and rank correlation."""
    agreement = measure_agreement(pair)
    if pair.is_gain:
        yield (
            f"{agreement.same_sign} of {agreement.cells} cells improve on the start where the paper's do, or "
            f"lose where those lose (Figure {pair.paper_figure}, {pair.students})."
        )
    yield (
        f"Of {agreement.pairs} pairs of cells that the paper's numbers tell apart, {agreement.same_order} "
        "stand in the same order here."
    )
    if np.isnan(agreement.correlation):
        yield "All cells are equal on one side, so there is no rank correlation."
    else:
        yield (
            f"Spearman's rank correlation over {agreement.cells} cells: {agreement.correlation:.2f} "
            f"[{agreement.low:.2f}, {agreement.high:.2f}] (95 %, bootstrap over cells)."
        )
