"""One HTML page that stands alone: figures inline, no request to anywhere, every text escaped."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from gkd_lab.config import Cell, Grid
from gkd_lab.figures.heat_maps import curves, heat_map, loss_curves
from gkd_lab.figures.method_figures import bars, lines
from gkd_lab.figures.style import render_inline_svg
from gkd_lab.report.paper_section import (
    build_claim_rows,
    build_cost_section,
    build_paper_comparison,
    collect_facts,
)
from gkd_lab.report.samples import find_best_cell, list_failures, select_samples, summarize_provenance
from gkd_lab.report.summary_text import describe_point, describe_results
from gkd_lab.statistics.bootstrap import ExampleStatistics, load_example_statistics
from gkd_lab.statistics.differences import StartDifference, compute_start_differences
from gkd_lab.statistics.summaries import expand_table, summary
from gkd_lab.store import Record, State, Store, combine_states
from gkd_lab.store.files import write_text
from gkd_lab.tables.loss_labels import divergence_label, format_axis_value
from gkd_lab.tables.rows import find_headline_column
from gkd_lab.tables.table import list_axes, table

STATES: tuple[State, ...] = ("done", "running", "failed", "missing")

MAX_LOSS_CURVES = 200
"""Cells of a task whose training histories are still drawn in one figure."""


def write_report(grid: Grid, store: Store, path: Path) -> Path:
    """Write the report of a grid to `path`, by rename; with nothing done it says so."""
    frame = table(grid, store)
    environment = Environment(
        loader=PackageLoader("gkd_lab.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        grid=grid,
        experiment=grid.experiment,
        counts=_count_states(frame),
        axes=[(axis, _format_axis_values(axis, values)) for axis, values in grid.axes.items()],
        tasks=[_build_task_section(grid, store, frame, task) for task in frame["task"].unique()],
        claims=build_claim_rows(grid, store),
        failures=list_failures(grid, store),
        origins=summarize_provenance(grid, store),
    )
    write_text(path, page)
    return path


def _count_states(frame: pd.DataFrame) -> list[tuple[str, int, int]]:
    """(state, cells, reference models) for each state, the finished first."""
    by_role = {
        role: Counter(frame.loc[(frame["role"] == "cell") == (role == "cell"), "status"])
        for role in ("cell", "reference")
    }
    return [(state, by_role["cell"][state], by_role["reference"][state]) for state in STATES]


def _format_axis_values(axis: str, values: Sequence[Any]) -> str:
    return ("; " if axis == "objectives" else ", ").join(format_axis_value(axis, value) for value in values)


def _build_task_section(grid: Grid, store: Store, frame: pd.DataFrame, task: str) -> dict[str, Any]:
    metric = find_headline_column(grid, task)
    cells = {cell.fingerprint: cell for cell in grid.cells if cell.task == task}
    first = next(iter(cells.values()))
    evaluation = first.evaluations[0]
    records = {cell.training.start.fingerprint: _get_start_record(store, cell) for cell in cells.values()}
    records |= {fingerprint: store.get_record(cell) for fingerprint, cell in cells.items()}

    @cache
    def written(fingerprint: str) -> ExampleStatistics | None:
        return load_example_statistics(records[fingerprint], evaluation, metric.split("/", 1)[1])

    differences = compute_start_differences(frame, metric, task, written)
    best = find_best_cell(grid, frame, metric, task)
    order = list(frame["task"].unique()).index(task)
    return {
        "name": task,
        "metric": metric,
        "findings": describe_results(frame, metric, task, written, differences),
        "figures": _draw_figures(grid, store, frame, task, metric, has_scores=best is not None),
        "beside": build_paper_comparison(collect_facts(grid, store, frame), task, f"beside{order}"),
        "cost": build_cost_section(grid, store, frame, metric, task, f"cost{order}"),
        "scores": _build_score_rows(frame, metric, task, differences),
        "compared": sum(one.adjusted_p_value is not None for one in differences),
        "axes": list_axes(frame),
        "best": None if best is None else _describe_cell(best),
        "samples": [] if best is None else select_samples(store, best),
    }


def _get_start_record(store: Store, cell: Cell) -> Record:
    return store.get_artifact(cell.scale, "start", cell.training.start)


def _describe_cell(cell: Any) -> str:
    others = [axis for axis in cell.labels if axis not in ("task", "lmbda", "beta", "divergence", "seed")]
    row = {**cell.labels, "lmbda": cell.lmbda, "beta": cell.beta}
    return f"{describe_point(row, others)}, seed {cell.seed}"


def _draw_figures(
    grid: Grid,
    store: Store,
    frame: pd.DataFrame,
    task: str,
    metric: str,
    has_scores: bool,
) -> dict[str, Markup]:
    """Name -> inline SVG; the SVG is our own and its texts are escaped by matplotlib."""
    drawn: dict[str, Figure] = {}
    if "objectives" not in list_axes(frame):
        drawn["map"] = heat_map(frame, metric, task)
    if has_scores:
        drawn |= _draw_scores(frame, metric, task)
    logged = [c for c in grid.cells if c.task == task and store.get_record(c).metrics_file.exists()]
    if 0 < len(logged) <= MAX_LOSS_CURVES:
        drawn["losses"] = loss_curves(grid, store, task)
    labels = {
        "map": f"Heat map of {metric} on {task} over lambda and divergence",
        "terms": f"{metric} on {task} by the terms of the loss",
        "curves": f"{metric} on {task} against lambda, one line for each divergence",
        "losses": f"Training loss on {task} against the step, for each lambda",
    }
    order = list(frame["task"].unique()).index(task)
    return {
        name: Markup(render_inline_svg(figure, f"{name}{order}", labels[name]))
        for name, figure in drawn.items()
    }


def _draw_scores(frame: pd.DataFrame, metric: str, task: str) -> dict[str, Figure]:
    """Scores by the terms of the loss where they are an axis, else by its divergence."""
    if "objectives" not in list_axes(frame):
        return {"curves": curves(frame, metric, task)}
    here = frame[frame["task"] == task]
    if here["lmbda"].nunique() > 1:
        return {"terms": lines(here, metric, x_axis="lmbda", line_axis="objectives")}
    return {"terms": bars(here, metric, bar_axis="objectives")}


def _build_score_rows(
    frame: pd.DataFrame, metric: str, task: str, differences: Sequence[StartDifference]
) -> list[dict[str, Any]]:
    """Rows of the report's table: the references, then the cells with how they differ from their start."""
    here = frame[frame["task"] == task]
    placed = expand_table(here)
    keys = ["role", "lmbda", "beta", *list_axes(frame)]
    rows = []
    for row in summary(here, metric).to_dict("records"):
        same = placed
        for key in keys:
            same = same[same[key].isna() if pd.isna(row[key]) else same[key] == row[key]]
        states = Counter(sorted(same["status"], key=STATES.index))
        rows.append(
            {
                **{str(key): None if pd.isna(value) else value for key, value in row.items()},
                **_format_objectives(row),
                "divergence": None if pd.isna(row["beta"]) else divergence_label(row["beta"]),
                "worst": combine_states(list(states)),
                "difference": _find_difference(differences, row) if row["role"] == "cell" else None,
                "states": ", ".join(
                    state if len(same) == 1 else f"{count} {state}" for state, count in states.items()
                ),
            }
        )
    return rows


def _format_objectives(row: Mapping[Any, Any]) -> dict[str, str]:
    """A list of objectives by its terms."""
    stated = row.get("objectives")
    return (
        {"objectives": format_axis_value("objectives", stated)}
        if isinstance(stated, str | tuple | list)
        else {}
    )


def _find_difference(
    differences: Sequence[StartDifference], row: Mapping[Any, Any]
) -> StartDifference | None:
    for one in differences:
        if all(_is_equal(row[name], value) for name, value in one.axis_values.items()):
            return one
    return None


def _is_equal(a: Any, b: Any) -> bool:
    return bool(pd.isna(a) and pd.isna(b)) or bool(a == b)
