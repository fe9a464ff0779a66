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
from gkd_lab.claims.facts import Fact
from gkd_lab.claims.place_names import named, varying
from gkd_lab.figures.panels import head, lay_out
from gkd_lab.figures.style import FAINT, GAINS, INK, LOSSES_AND_GAINS, PAPER, VOID, readable_on, styled
from gkd_lab.tables.loss_labels import divergence_label

Cell = tuple[float, float]
"""(lmbda, beta)"""

FEWEST = 4
"""Cells in common below which two maps are not worth comparing."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Beside:
    """One panel of ours and the paper's, at the cells that ours has."""

    title: str
    figure: str
    """Of the paper."""
    students: str
    """Whose numbers of the paper: a size, or the mean of several."""
    ours: Mapping[Cell, float]
    theirs: Mapping[Cell, float]
    rounding: float
    """By how much a difference of two of the paper's cells must exceed 0 to be told apart."""
    over_start: bool
    """Improvements over the start; else differences from the mean, where the paper states no start."""

    @property
    def common(self) -> list[Cell]:
        """Cells that both have."""
        return sorted(self.ours.keys() & self.theirs.keys())


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


def beside(facts: Sequence[Fact], task: str) -> list[Beside]:
    """The panels of a task that have a heat map in the paper, with at least four cells in common."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        if fact.place["task"] == task and fact.place["measure"] == "quality":
            groups.setdefault(str(_context(fact)), []).append(fact)
    places = [group[0].place for group in groups.values()]
    fields = [name for name in varying(places) if name not in _INSIDE]
    pairs = (_pair(group, named(group[0].place, ["task", *fields])) for group in groups.values())
    return [pair for pair in pairs if pair is not None and len(pair.common) >= FEWEST]


_INSIDE = ("lmbda", "beta", "loss", "role", "alpha", "anchor")


def _context(fact: Fact) -> list[Any]:
    return [(name, value) for name, value in fact.place.items() if name not in _INSIDE]


def _pair(group: Sequence[Fact], title: str) -> Beside | None:
    found = _paper_map(group[0].place)
    if found is None:
        return None
    theirs, figure, students, rounding, over_start = found
    ours = _means(group)
    start = _start(group)
    if over_start and start is not None:
        ours = {cell: value - start for cell, value in ours.items()}
    else:
        ours, theirs, over_start = _centred(ours, theirs), _centred(theirs, ours), False
    return Beside(title, figure, students, ours, theirs, rounding, over_start)


def _centred(cells: Mapping[Cell, float], others: Mapping[Cell, float]) -> dict[Cell, float]:
    """Differences from the mean over the cells in common."""
    common = cells.keys() & others.keys()
    mean = float(np.mean([cells[one] for one in common])) if common else 0.0
    return {cell: value - mean for cell, value in cells.items()}


def _means(group: Sequence[Fact]) -> dict[Cell, float]:
    values: dict[Cell, list[float]] = {}
    for fact in group:
        if fact.place["role"] == "cell" and fact.place["loss"] == "jsd" and fact.value is not None:
            values.setdefault((fact.place["lmbda"], fact.place["beta"]), []).append(fact.value)
    return {cell: float(np.mean(found)) for cell, found in values.items()}


def _start(group: Sequence[Fact]) -> float | None:
    found = {fact.value for fact in group if fact.place["role"] == "start" and fact.value is not None}
    return float(np.mean(list(found))) if found else None


def _paper_map(place: Mapping[str, Any]) -> tuple[dict[Cell, float], str, str, float, bool] | None:
    """The paper's numbers for a task and a decoding: of the same student, or the mean over its sizes."""
    figures = _figures(place)
    rows = paper.values()
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


def _figures(place: Mapping[str, Any]) -> tuple[str, ...]:
    if place["task"] == "summarization" and place.get("decoding") == "sample":
        return ("A.12",) if place.get("temperature") == 1.0 else ()
    return {"summarization": ("A.13",), "translation": ("6",), "arithmetic": ("7", "A.14")}.get(
        place["task"], ()
    )


def agreement(pair: Beside, seed: int = 0) -> Agreement:
    """Signs, orders and ranks over the common cells."""
    cells = pair.common
    ours = np.array([pair.ours[cell] for cell in cells])
    theirs = np.array([pair.theirs[cell] for cell in cells])
    told_apart = [
        (a, b)
        for a, b in combinations(range(len(cells)), 2)
        if abs(theirs[a] - theirs[b]) > pair.rounding - 1e-9
    ]
    same_order = sum((ours[a] - ours[b]) * (theirs[a] - theirs[b]) > 0 for a, b in told_apart)
    low, high = _interval(ours, theirs, seed)
    return Agreement(
        cells=len(cells),
        same_sign=int(np.sum(np.sign(ours) == np.sign(theirs))),
        same_order=int(same_order),
        pairs=len(told_apart),
        correlation=_spearman(ours, theirs),
        low=low,
        high=high,
    )


def _spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    if len(set(a)) < 2 or len(set(b)) < 2:
        return float("nan")
    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def _interval(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    chosen = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    ranks = pd.DataFrame(a[chosen]).rank(axis=1), pd.DataFrame(b[chosen]).rank(axis=1)
    found = ranks[0].corrwith(ranks[1], axis=1).dropna()
    if found.empty:
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def sentences(pair: Beside) -> Iterator[str]:
    """The agreement in words."""
    found = agreement(pair)
    if pair.over_start:
        yield (
            f"{found.same_sign} of {found.cells} cells improve on the start where the paper's do, or lose "
            f"where those lose (Figure {pair.figure}, {pair.students})."
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


def beside_map(pairs: Sequence[Beside]) -> Figure:
    """For each pair our map and the paper's side by side: one scale of colours, the same cells."""
    with styled():
        betas = max(len({beta for _, beta in pair.theirs}) for pair in pairs)
        figure, axes = lay_out(2 * len(pairs), max(4.2, 1.05 + 0.86 * betas), 3.0, columns=2)
        for n, pair in enumerate(pairs):
            both = [*pair.ours.values(), *pair.theirs.values()]
            what = "improvement over the start" if pair.over_start else "difference from the mean"
            _draw(axes[2 * n], pair, pair.ours, both)
            head(axes[2 * n], f"ours: {pair.title}", f"{what}, in points")
            _draw(axes[2 * n + 1], pair, pair.theirs, both)
            head(axes[2 * n + 1], f"the paper: Figure {pair.figure}", f"{what}, {pair.students}")
        return figure


def _draw(axes: Axes, pair: Beside, values: Mapping[Cell, float], both: Sequence[float]) -> None:
    cells = pair.ours.keys() | pair.theirs.keys()
    lmbdas, betas = (sorted({cell[n] for cell in cells}) for n in (0, 1))
    for lmbda in lmbdas:
        for beta in betas:
            square, value = (betas.index(beta), lmbdas.index(lmbda)), values.get((lmbda, beta))
            if value is None:
                _square(axes, square, VOID, "", hatch="////")
            else:
                text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
                _square(axes, square, _color(value, both), text, bold=value == max(values.values()))
    axes.set(xlim=(-0.5, len(betas) - 0.5), ylim=(-0.5, len(lmbdas) - 0.5))
    axes.set_xticks(range(len(betas)), [divergence_label(beta) for beta in betas])
    axes.set_yticks(range(len(lmbdas)), [f"{lmbda:g}" for lmbda in lmbdas])
    axes.set_ylabel("λ", rotation=0, labelpad=10, va="center", fontsize=11)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _square(
    axes: Axes, at: tuple[int, int], color: Any, text: str, bold: bool = False, hatch: str | None = None
) -> None:
    corner = (at[0] - 0.5, at[1] - 0.5)
    axes.add_patch(
        Rectangle(corner, 1, 1, fc=color, ec=FAINT if hatch else PAPER, lw=0 if hatch else 2, hatch=hatch)
    )
    ink = INK if hatch else readable_on(color)
    axes.text(*at, text, ha="center", va="center", color=ink, fontweight="bold" if bold else "normal")


def _color(value: float, values: Sequence[float]) -> Any:
    """As the heat maps: pale to dark blue; where signs differ, 0 is white and losses are orange."""
    low, high = min(values), max(values)
    if low < 0 < high:
        end = max(-low, high)
        return LOSSES_AND_GAINS(float(Normalize(-end, end)(value)))
    return GAINS(float(Normalize(low, high)(value)) if low < high else 0.5)
