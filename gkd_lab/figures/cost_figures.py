"""Scores against training costs: the paper compares at equal steps (§A.3), which is not equal compute.

Only completion tokens are counted. Prompts cost as well, and are the same for all cells of a task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from gkd_lab.config import Cell, Grid
from gkd_lab.figures.layout import add_legend, create_axes, set_panel_title
from gkd_lab.figures.panels import format_metric
from gkd_lab.figures.style import MARKERS, MUTED, apply_style, get_divergence_color
from gkd_lab.store import Record, Store
from gkd_lab.tables.divergences import get_divergence, list_divergences
from gkd_lab.tables.results import measure_step_seconds

COST_LABELS = {
    "generated": "tokens that the student wrote",
    "taught": "tokens that the teacher judged",
    "seconds": "seconds of training",
}
EQUAL_TOLERANCE = 0.01
"""Share by which a cost may vary and still count as equal in all cells."""


@dataclass(frozen=True)
class TrainingCost:
    """Completion tokens and seconds of the training of one cell; None: not recorded."""

    generated: float | None
    taught: float | None
    seconds: float | None


def compute_costs(grid: Grid, store: Store, task: str) -> dict[str, TrainingCost]:
    """Map the fingerprint of each done cell of a task to its training cost."""
    seconds = measure_step_seconds(grid, store)
    return {
        cell.fingerprint: _compute_cost(cell, store.get_record(cell), seconds)
        for cell in grid.cells
        if cell.task == task and store.get_record(cell).read_state() == "done"
    }


def _compute_cost(cell: Cell, record: Record, seconds: Mapping[str, float]) -> TrainingCost:
    """Compute a cell's tokens from its history and its seconds; what was not recorded is None.

    Tokens are mean length times rows times steps; `generated` is the on-policy share of them.
    """
    history, rows, previous_step = record.read_history(), cell.training.batch_size, 0
    generated, taught = 0.0, 0.0
    for row in history:
        tokens = row.get("completion_length", float("nan")) * rows * (row["step"] - previous_step)
        generated += tokens * row.get("on_policy", float("nan"))
        taught += tokens
        previous_step = row["step"]
    if cell.divergence == "cross_entropy":
        taught = 0.0
    step_seconds = seconds.get(cell.fingerprint)
    return TrainingCost(
        generated=generated if history and np.isfinite(generated) else None,
        taught=taught if history and np.isfinite(taught) else None,
        seconds=None if step_seconds is None else step_seconds * cell.training.steps,
    )


def list_varying_costs(costs: Mapping[str, TrainingCost]) -> list[str]:
    """Return the names of the costs whose range over the cells exceeds one per cent."""
    return [
        name for name in COST_LABELS if (values := _collect_costs(costs, name)) and not _is_constant(values)
    ]


def describe_omitted_costs(costs: Mapping[str, TrainingCost]) -> str | None:
    """Return a sentence on the costs that are not drawn, and why; None if all are drawn."""
    reasons = [
        _explain_omission(name, _collect_costs(costs, name))
        for name in COST_LABELS
        if name not in list_varying_costs(costs)
    ]
    return f"Left out: {'; '.join(reasons)}." if reasons else None


def _collect_costs(costs: Mapping[str, TrainingCost], name: str) -> list[float]:
    """Return the values of one cost over the cells, without those that are None."""
    return [value for cost in costs.values() if (value := getattr(cost, name)) is not None]


def _is_constant(values: Sequence[float]) -> bool:
    """Return whether values range over at most 1 % of the largest."""
    return max(values) - min(values) <= EQUAL_TOLERANCE * max(values)


def _explain_omission(name: str, values: Sequence[float]) -> str:
    """Return a text: a cost is equal in all cells or, if `values` is empty, not recorded."""
    if values:
        return f"{COST_LABELS[name]}, {np.mean(values):,.0f} in each cell to within 1 %"
    if name == "seconds":
        return (
            f"{COST_LABELS[name]}, as no cell was trained alone and a pack's time is that of all its members"
        )
    return f"{COST_LABELS[name]}, as the histories hold no lengths"


def cost_scatter(
    scores: pd.DataFrame, costs: Mapping[str, TrainingCost], *, width: float | None = None
) -> Figure | None:
    """Draw scores against each varying cost, a panel per cost, a point per cell; None if no cost varies.

    Takes the rows of `select_scores` of one task. The colour is the divergence, the shape lmbda. `width` is
    in inches: None is a column for one panel, else the text of a page.
    """
    cells = scores[(scores["role"] == "cell") & scores["value"].notna() & scores["cell"].isin(list(costs))]
    names = list_varying_costs({cell: costs[cell] for cell in cells["cell"]})
    if not names:
        return None
    with apply_style():
        figure, axes = create_axes(len(names), 2.1, panel_width=1.6, width=width, sharey=True)
        for name, panel_axes in zip(names, axes, strict=True):
            _draw_points(panel_axes, cells, {cell: getattr(cost, name) for cell, cost in costs.items()})
            panel_axes.set_xlabel(COST_LABELS[name].replace(" that ", "\nthat "))
            if panel_axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
                panel_axes.set_ylabel(format_metric(scores))
        seeds = cells["seed"].nunique()
        set_panel_title(
            axes[0], str(cells["task"].iloc[0]), f"{seeds} seed{'s' if seeds > 1 else ''}, a point each"
        )
        _add_legend(figure, cells)
        return figure


def _draw_points(axes: Axes, cells: pd.DataFrame, costs: Mapping[str, float | None]) -> None:
    """Draw a point per cell that has a cost; the colour is its divergence, the shape its lmbda."""
    for row in cells.to_dict("records"):
        cost = costs.get(row["cell"])
        if cost is not None:
            color = get_divergence_color(get_divergence(row))
            marker = _choose_marker(row["lmbda"], cells)
            axes.plot(cost, row["value"], marker, ms=4.5, color=color, alpha=0.85, mew=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(0.08)


def _choose_marker(lmbda: float, cells: pd.DataFrame) -> str:
    """Return the marker for the rank of this lmbda among the cells'; markers repeat when used up."""
    return MARKERS[sorted(cells["lmbda"].unique()).index(lmbda) % len(MARKERS)]


def _add_legend(figure: Figure, cells: pd.DataFrame) -> None:
    """Add a legend of a colour per divergence and a shape per lmbda."""
    handles = [
        Line2D([], [], marker="o", ls="", color=get_divergence_color(divergence), label=divergence.label)
        for divergence in list_divergences(cells)
    ]
    handles += [
        Line2D([], [], marker=_choose_marker(lmbda, cells), ls="", color=MUTED, label=f"λ = {lmbda:g}")
        for lmbda in sorted(cells["lmbda"].unique())
    ]
    add_legend(figure, [], handles)
