"""Scores against what they cost: the paper compares at equal steps (§A.3), which is not equal compute.

Counted are completion tokens only. Prompts cost as well, and are the same for all cells of a task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from gkd_lab.claims.run_claims import step_seconds
from gkd_lab.config import Cell, GridOfCells
from gkd_lab.figures.panels import lay_out
from gkd_lab.figures.style import MARKERS, MUTED, divergence_color, styled
from gkd_lab.store import Record, Store
from gkd_lab.tables.loss_labels import divergence_label

QUANTITIES = {
    "generated": "tokens that the student wrote",
    "taught": "tokens that the teacher judged",
    "seconds": "seconds of training",
}


@dataclass(frozen=True)
class Cost:
    """What the training of one cell took; None: not recorded."""

    generated: float | None
    taught: float | None
    seconds: float | None


def costs(grid: GridOfCells, store: Store, task: str) -> dict[str, Cost]:
    """Fingerprint -> cost, of the finished cells of a task."""
    seconds = step_seconds(grid, store)
    return {
        cell.fingerprint: _cost(cell, store.of(cell), seconds)
        for cell in grid.cells
        if cell.task == task and store.of(cell).state() == "done"
    }


def _cost(cell: Cell, record: Record, seconds: Mapping[str, float]) -> Cost:
    """Tokens by the history: mean length times rows times steps, and the share that the student wrote."""
    history, rows, before = record.history(), cell.training.batch_size, 0
    generated, taught = 0.0, 0.0
    for row in history:
        tokens = row.get("completion_length", float("nan")) * rows * (row["step"] - before)
        generated += tokens * row.get("on_policy", float("nan"))
        taught += tokens
        before = row["step"]
    step = seconds.get(cell.fingerprint)
    judged = 0.0 if cell.divergence == "cross_entropy" else taught
    return Cost(
        _known(generated, history),
        _known(judged, history),
        None if step is None else step * cell.training.steps,
    )


def _known(value: float, history: Sequence[object]) -> float | None:
    return value if history and np.isfinite(value) else None


EQUAL = 0.01
"""Share by which a quantity may vary and still be the same for all cells."""


def recorded(found: Mapping[str, Cost]) -> list[str]:
    """The quantities in which the cells differ by more than one per cent."""
    return [name for name in QUANTITIES if (known := _values(found, name)) and not _is_equal(known)]


def left_out(found: Mapping[str, Cost]) -> str | None:
    """Which quantities are not drawn, and why."""
    reasons = [_reason(name, _values(found, name)) for name in QUANTITIES if name not in recorded(found)]
    return f"Left out: {'; '.join(reasons)}." if reasons else None


def _values(found: Mapping[str, Cost], name: str) -> list[float]:
    return [value for one in found.values() if (value := getattr(one, name)) is not None]


def _is_equal(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= EQUAL * max(values)


def _reason(name: str, values: Sequence[float]) -> str:
    if values:
        return f"{QUANTITIES[name]}, {np.mean(values):,.0f} in each cell to within 1 %"
    if name == "seconds":
        return (
            f"{QUANTITIES[name]}, as no cell was trained alone and a pack's time is that of all its members"
        )
    return f"{QUANTITIES[name]}, as the histories hold no lengths"


def against_cost(frame: pd.DataFrame, metric: str, task: str, found: Mapping[str, Cost]) -> Figure | None:
    """Score against each quantity, a point a cell; colour is the divergence, shape is lambda."""
    cells = frame[(frame["role"] == "cell") & (frame["task"] == task) & frame[metric].notna()]
    cells = cells[cells["cell"].isin(list(found))]
    names = recorded({cell: found[cell] for cell in cells["cell"]})
    if not names:
        return None
    with styled():
        figure, axes = lay_out(len(names), 3.5, 3.0, sharey=True)
        for name, place in zip(names, axes, strict=True):
            _draw(place, cells, metric, {cell: getattr(one, name) for cell, one in found.items()})
            place.set_xlabel(QUANTITIES[name])
        axes[0].set_ylabel(metric.rsplit("/", 1)[-1].replace("_", " "))
        _legend(figure, cells)
        return figure


def _draw(axes: Axes, cells: pd.DataFrame, metric: str, cost: Mapping[str, float | None]) -> None:
    for row in cells.to_dict("records"):
        at = cost.get(row["cell"])
        if at is not None:
            beta = None if pd.isna(row["beta"]) else row["beta"]
            marker = _marker(row["lmbda"], cells)
            axes.plot(at, row[metric], marker, ms=6, color=divergence_color(beta), alpha=0.85, mew=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(0.08)


def _marker(lmbda: float, cells: pd.DataFrame) -> str:
    return MARKERS[sorted(cells["lmbda"].unique()).index(lmbda) % len(MARKERS)]


def _legend(figure: Figure, cells: pd.DataFrame) -> None:
    betas = [None if pd.isna(beta) else float(beta) for beta in cells["beta"].drop_duplicates().sort_values()]
    handles = [
        Line2D([], [], marker="o", ls="", color=divergence_color(beta), label=divergence_label(beta))
        for beta in betas
    ]
    handles += [
        Line2D([], [], marker=_marker(lmbda, cells), ls="", color=MUTED, label=f"λ = {lmbda:g}")
        for lmbda in sorted(cells["lmbda"].unique())
    ]
    figure.legend(handles=handles, loc="outside right center")
