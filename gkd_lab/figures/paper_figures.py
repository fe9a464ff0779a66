"""Ours beside the paper's: the same cells on one scale, and how far they agree.

A panel of ours meets the heat map of its task and decoding: Figures 6, 7, A.12 to A.14.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gkd_lab.claims import paper
from gkd_lab.claims.figure_cells import find_distinguishing_fields, format_fields
from gkd_lab.claims.measurements import Measurement
from gkd_lab.figures.panels import create_axes, set_panel_title
from gkd_lab.figures.style import (
    FAINT,
    GAIN_COLORS,
    INK,
    MISSING,
    PAPER,
    SIGNED_COLORS,
    apply_style,
    choose_text_color,
)
from gkd_lab.tables.loss_labels import divergence_label

GridPoint = tuple[float, float]
"""(lmbda, beta)"""

MIN_COMMON_CELLS = 4
"""Cells in common below which two maps are not worth comparing."""
RESAMPLES = 2000


@dataclass(frozen=True)
class MapPair:
    """One panel of ours and the paper's, at the cells that ours has."""

    title: str
    paper_figure: str
    """Of the paper."""
    students: str
    """Whose numbers of the paper: a size, or the mean of several."""
    run_values: Mapping[GridPoint, float]
    paper_values: Mapping[GridPoint, float]
    min_difference: float
    """By how much a difference of two of the paper's cells must exceed 0 to be told apart."""
    is_gain: bool
    """Improvements over the start; else differences from the mean, where the paper states no start."""

    @property
    def common_points(self) -> list[GridPoint]:
        """Cells that both have."""
        return sorted(self.run_values.keys() & self.paper_values.keys())


@dataclass(frozen=True)
class Agreement:
    """How far two maps say the same."""

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


def pair_maps(facts: Sequence[Measurement], task: str) -> list[MapPair]:
    """The panels of a task that have a heat map in the paper, with at least four cells in common."""
    groups: dict[str, list[Measurement]] = {}
    for fact in facts:
        if fact.figure_cell["task"] == task and fact.figure_cell["measure"] == "quality":
            groups.setdefault(str(_list_context_fields(fact)), []).append(fact)
    places = [group[0].figure_cell for group in groups.values()]
    fields = [name for name in find_distinguishing_fields(places) if name not in _MAP_FIELDS]
    pairs = (
        _build_pair(group, format_fields(group[0].figure_cell, ["task", *fields]))
        for group in groups.values()
    )
    return [pair for pair in pairs if pair is not None and len(pair.common_points) >= MIN_COMMON_CELLS]


_MAP_FIELDS = ("lmbda", "beta", "loss", "role", "alpha", "anchor")


def _list_context_fields(fact: Measurement) -> list[Any]:
    return [(name, value) for name, value in fact.figure_cell.items() if name not in _MAP_FIELDS]


def _build_pair(group: Sequence[Measurement], title: str) -> MapPair | None:
    found = _load_paper_map(group[0].figure_cell)
    if found is None:
        return None
    theirs, figure, students, rounding, over_start = found
    ours = _average_cells(group)
    start = _average_start(group)
    if over_start and start is not None:
        ours = {cell: value - start for cell, value in ours.items()}
    else:
        ours, theirs, over_start = _center_values(ours, theirs), _center_values(theirs, ours), False
    return MapPair(title, figure, students, ours, theirs, rounding, over_start)


def _center_values(
    values: Mapping[GridPoint, float], other_values: Mapping[GridPoint, float]
) -> dict[GridPoint, float]:
    """Differences from the mean over the cells in common."""
    common = values.keys() & other_values.keys()
    mean = float(np.mean([values[one] for one in common])) if common else 0.0
    return {cell: value - mean for cell, value in values.items()}


def _average_cells(group: Sequence[Measurement]) -> dict[GridPoint, float]:
    values: dict[GridPoint, list[float]] = {}
    for fact in group:
        if (
            fact.figure_cell["role"] == "cell"
            and fact.figure_cell["loss"] == "jsd"
            and fact.value is not None
        ):
            values.setdefault((fact.figure_cell["lmbda"], fact.figure_cell["beta"]), []).append(fact.value)
    return {cell: float(np.mean(found)) for cell, found in values.items()}


def _average_start(group: Sequence[Measurement]) -> float | None:
    found = {fact.value for fact in group if fact.figure_cell["role"] == "start" and fact.value is not None}
    return float(np.mean(list(found))) if found else None


def _load_paper_map(place: Mapping[str, Any]) -> tuple[dict[GridPoint, float], str, str, float, bool] | None:
    """The paper's numbers for a task and a decoding: of the same student, or the mean over its sizes."""
    figures = _list_paper_figures(place)
    rows = paper.load_values()
    rows = rows[rows["figure"].isin(figures) & (rows["role"] == "cell")]
    if rows.empty:
        return None
    sizes = [str(size) for size in rows["student"].unique()]
    chosen = [size for size in sizes if size == place.get("student")] or sizes
    rows = rows[rows["student"].isin(chosen)]
    over_start = bool(rows["gain"].notna().all())
    column = "gain" if over_start else "value"
    means = rows.groupby(["lmbda", "beta"], as_index=False)[[column]].mean().to_dict("records")
    cells = {(float(row["lmbda"]), float(row["beta"])): float(row[column]) for row in means}
    students = chosen[0] if len(chosen) == 1 else f"mean of {', '.join(chosen)}"
    figure = " and ".join(dict.fromkeys(rows["figure"]))
    return cells, figure, students, 2 * float(rows["error"].max()), over_start


def _list_paper_figures(place: Mapping[str, Any]) -> tuple[str, ...]:
    if place["task"] == "summarization" and place.get("decoding") == "sample":
        return ("A.12",) if place.get("temperature") == 1.0 else ()
    return {"summarization": ("A.13",), "translation": ("6",), "arithmetic": ("7", "A.14")}.get(
        place["task"], ()
    )


def measure_agreement(pair: MapPair, seed: int = 0) -> Agreement:
    """Signs, orders and ranks over the common cells."""
    cells = pair.common_points
    ours = np.array([pair.run_values[cell] for cell in cells])
    theirs = np.array([pair.paper_values[cell] for cell in cells])
    told_apart = [
        (a, b)
        for a, b in combinations(range(len(cells)), 2)
        if abs(theirs[a] - theirs[b]) > pair.min_difference - 1e-9
    ]
    same_order = sum((ours[a] - ours[b]) * (theirs[a] - theirs[b]) > 0 for a, b in told_apart)
    low, high = _bootstrap_spearman(ours, theirs, seed)
    return Agreement(
        cells=len(cells),
        same_sign=int(np.sum(np.sign(ours) == np.sign(theirs))),
        same_order=int(same_order),
        pairs=len(told_apart),
        correlation=_compute_spearman(ours, theirs),
        low=low,
        high=high,
    )


def _compute_spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    if len(set(a)) < 2 or len(set(b)) < 2:
        return float("nan")
    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def _bootstrap_spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    chosen = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    ranks = pd.DataFrame(a[chosen]).rank(axis=1), pd.DataFrame(b[chosen]).rank(axis=1)
    found = ranks[0].corrwith(ranks[1], axis=1).dropna()
    if found.empty:
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def describe_agreement(pair: MapPair) -> Iterator[str]:
    """The agreement in words."""
    found = measure_agreement(pair)
    if pair.is_gain:
        yield (
            f"{found.same_sign} of {found.cells} cells improve on the start where the paper's do, or lose "
            f"where those lose (Figure {pair.paper_figure}, {pair.students})."
        )
    yield (
        f"Of {found.pairs} pairs of cells that the paper's numbers tell apart, {found.same_order} stand in "
        "the same order here."
    )
    if np.isnan(found.correlation):
        yield "All cells are equal on one side, so there is no rank correlation."
    else:
        yield (
            f"Spearman's rank correlation over {found.cells} cells: {found.correlation:.2f} "
            f"[{found.low:.2f}, {found.high:.2f}] (95 %, bootstrap over cells)."
        )


def paired_heat_maps(pairs: Sequence[MapPair]) -> Figure:
    """For each pair our map and the paper's side by side: one scale of colours, the same cells."""
    with apply_style():
        betas = max(len({beta for _, beta in pair.paper_values}) for pair in pairs)
        figure, axes = create_axes(2 * len(pairs), max(4.2, 1.05 + 0.86 * betas), 3.0, columns=2)
        for n, pair in enumerate(pairs):
            both = [*pair.run_values.values(), *pair.paper_values.values()]
            what = "improvement over the start" if pair.is_gain else "difference from the mean"
            _draw_heat_map(axes[2 * n], pair, pair.run_values, both)
            set_panel_title(axes[2 * n], f"ours: {pair.title}", f"{what}, in points")
            _draw_heat_map(axes[2 * n + 1], pair, pair.paper_values, both)
            set_panel_title(
                axes[2 * n + 1], f"the paper: Figure {pair.paper_figure}", f"{what}, {pair.students}"
            )
        return figure


def _draw_heat_map(
    axes: Axes, pair: MapPair, values: Mapping[GridPoint, float], color_range: Sequence[float]
) -> None:
    cells = pair.run_values.keys() | pair.paper_values.keys()
    lmbdas, betas = (sorted({cell[n] for cell in cells}) for n in (0, 1))
    for lmbda in lmbdas:
        for beta in betas:
            square, value = (betas.index(beta), lmbdas.index(lmbda)), values.get((lmbda, beta))
            if value is None:
                _draw_square(axes, square, MISSING, "", hatch="////")
            else:
                text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
                _draw_square(
                    axes, square, _choose_color(value, color_range), text, bold=value == max(values.values())
                )
    axes.set(xlim=(-0.5, len(betas) - 0.5), ylim=(-0.5, len(lmbdas) - 0.5))
    axes.set_xticks(range(len(betas)), [divergence_label(beta) for beta in betas])
    axes.set_yticks(range(len(lmbdas)), [f"{lmbda:g}" for lmbda in lmbdas])
    axes.set_ylabel("λ", rotation=0, labelpad=10, va="center", fontsize=11)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _draw_square(
    axes: Axes, at: tuple[int, int], color: Any, text: str, bold: bool = False, hatch: str | None = None
) -> None:
    corner = (at[0] - 0.5, at[1] - 0.5)
    axes.add_patch(
        Rectangle(corner, 1, 1, fc=color, ec=FAINT if hatch else PAPER, lw=0 if hatch else 2, hatch=hatch)
    )
    ink = INK if hatch else choose_text_color(color)
    axes.text(*at, text, ha="center", va="center", color=ink, fontweight="bold" if bold else "normal")


def _choose_color(value: float, values: Sequence[float]) -> Any:
    """As the heat maps: pale to dark blue; where signs differ, 0 is white and losses are orange."""
    low, high = min(values), max(values)
    if low < 0 < high:
        end = max(-low, high)
        return SIGNED_COLORS(float(Normalize(-end, end)(value)))
    return GAIN_COLORS(float(Normalize(low, high)(value)) if low < high else 0.5)
