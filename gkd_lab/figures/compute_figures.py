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

from gkd_lab.claims.run_claims import measure_step_seconds
from gkd_lab.config import Cell, Grid
from gkd_lab.figures.panels import create_axes
from gkd_lab.figures.style import MARKERS, MUTED, apply_style, get_divergence_color
from gkd_lab.store import Record, Store
from gkd_lab.tables.loss_labels import divergence_label

COST_LABELS = {
    "generated": "tokens that the student wrote",
    "taught": "tokens that the teacher judged",
    "seconds": "seconds of training",
}


@dataclass(frozen=True)
class TrainingCost:
    """What the training of one cell took; None: not recorded."""

    generated: float | None
    taught: float | None
    seconds: float | None


def compute_costs(grid: Grid, store: Store, task: str) -> dict[str, TrainingCost]:
    """Fingerprint -> cost, of the finished cells of a task."""
    seconds = measure_step_seconds(grid, store)
    return {
        cell.fingerprint: _compute_cost(cell, store.get_record(cell), seconds)
        for cell in grid.cells
        if cell.task == task and store.get_record(cell).read_state() == "done"
    }


def _compute_cost(cell: Cell, record: Record, seconds: Mapping[str, float]) -> TrainingCost:
    """Tokens by the history: mean length times rows times steps, and the share that the student wrote."""
    history, rows, before = record.read_history(), cell.training.batch_size, 0
    generated, taught = 0.0, 0.0
    for row in history:
        tokens = row.get("completion_length", float("nan")) * rows * (row["step"] - before)
        generated += tokens * row.get("on_policy", float("nan"))
        taught += tokens
        before = row["step"]
    step = seconds.get(cell.fingerprint)
    judged = 0.0 if cell.divergence == "cross_entropy" else taught
    return TrainingCost(
        _drop_unknown(generated, history),
        _drop_unknown(judged, history),
        None if step is None else step * cell.training.steps,
    )


def _drop_unknown(value: float, history: Sequence[object]) -> float | None:
    return value if history and np.isfinite(value) else None


EQUAL_TOLERANCE = 0.01
"""Share by which a quantity may vary and still be the same for all cells."""


def list_varying_costs(costs: Mapping[str, TrainingCost]) -> list[str]:
    """The quantities in which the cells differ by more than one per cent."""
    return [
        name for name in COST_LABELS if (known := _collect_costs(costs, name)) and not _is_constant(known)
    ]


def describe_omitted_costs(costs: Mapping[str, TrainingCost]) -> str | None:
    """Which quantities are not drawn, and why."""
    reasons = [
        _explain_omission(name, _collect_costs(costs, name))
        for name in COST_LABELS
        if name not in list_varying_costs(costs)
    ]
    return f"Left out: {'; '.join(reasons)}." if reasons else None


def _collect_costs(costs: Mapping[str, TrainingCost], name: str) -> list[float]:
    return [value for one in costs.values() if (value := getattr(one, name)) is not None]


def _is_constant(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= EQUAL_TOLERANCE * max(values)


def _explain_omission(name: str, values: Sequence[float]) -> str:
    if values:
        return f"{COST_LABELS[name]}, {np.mean(values):,.0f} in each cell to within 1 %"
    if name == "seconds":
        return (
            f"{COST_LABELS[name]}, as no cell was trained alone and a pack's time is that of all its members"
        )
    return f"{COST_LABELS[name]}, as the histories hold no lengths"


def cost_scatter(
    frame: pd.DataFrame, metric: str, task: str, costs: Mapping[str, TrainingCost]
) -> Figure | None:
    """Score against each quantity, a point a cell; colour is the divergence, shape is lambda."""
    cells = frame[(frame["role"] == "cell") & (frame["task"] == task) & frame[metric].notna()]
    cells = cells[cells["cell"].isin(list(costs))]
    names = list_varying_costs({cell: costs[cell] for cell in cells["cell"]})
    if not names:
        return None
    with apply_style():
        figure, axes = create_axes(len(names), 3.5, 3.0, sharey=True)
        for name, place in zip(names, axes, strict=True):
            _draw_points(place, cells, metric, {cell: getattr(one, name) for cell, one in costs.items()})
            place.set_xlabel(COST_LABELS[name])
        axes[0].set_ylabel(metric.rsplit("/", 1)[-1].replace("_", " "))
        _add_legend(figure, cells)
        return figure


def _draw_points(axes: Axes, cells: pd.DataFrame, metric: str, cost: Mapping[str, float | None]) -> None:
    for row in cells.to_dict("records"):
        at = cost.get(row["cell"])
        if at is not None:
            beta = None if pd.isna(row["beta"]) else row["beta"]
            marker = _choose_marker(row["lmbda"], cells)
            axes.plot(at, row[metric], marker, ms=6, color=get_divergence_color(beta), alpha=0.85, mew=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(0.08)


def _choose_marker(lmbda: float, cells: pd.DataFrame) -> str:
    return MARKERS[sorted(cells["lmbda"].unique()).index(lmbda) % len(MARKERS)]


def _add_legend(figure: Figure, cells: pd.DataFrame) -> None:
    betas = [None if pd.isna(beta) else float(beta) for beta in cells["beta"].drop_duplicates().sort_values()]
    handles = [
        Line2D([], [], marker="o", ls="", color=get_divergence_color(beta), label=divergence_label(beta))
        for beta in betas
    ]
    handles += [
        Line2D([], [], marker=_choose_marker(lmbda, cells), ls="", color=MUTED, label=f"λ = {lmbda:g}")
        for lmbda in sorted(cells["lmbda"].unique())
    ]
    figure.legend(handles=handles, loc="outside right center")
