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

from gkd_lab.config import Cell, GridOfCells
from gkd_lab.figures.heat_maps import curves, heat_map, losses
from gkd_lab.figures.method_figures import bars, lines
from gkd_lab.figures.style import inline_svg
from gkd_lab.report.paper_section import at_equal_cost, beside_the_paper, claim_rows, facts_of
from gkd_lab.report.samples import best_cell, failures, origins, samples
from gkd_lab.report.summary_text import findings, place
from gkd_lab.statistics.bootstrap import Sample, recorded_sample
from gkd_lab.statistics.differences import Difference, against_start
from gkd_lab.statistics.summaries import all_points, summary
from gkd_lab.store import Record, State, Store, worst
from gkd_lab.store.files import write_text
from gkd_lab.tables.loss_labels import axis_value, divergence_label
from gkd_lab.tables.rows import headline
from gkd_lab.tables.table import axes_of, table

STATES: tuple[State, ...] = ("done", "running", "failed", "missing")

MOST_HISTORIES = 200
"""Cells of a task whose training histories are still drawn in one figure."""


def write_report(grid: GridOfCells, store: Store, path: Path) -> Path:
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
        counts=_counts(frame),
        axes=[(axis, _stated(axis, values)) for axis, values in grid.axes.items()],
        tasks=[_task(grid, store, frame, task) for task in frame["task"].unique()],
        claims=claim_rows(grid, store),
        failures=failures(grid, store),
        origins=origins(grid, store),
    )
    write_text(path, page)
    return path


def _counts(frame: pd.DataFrame) -> list[tuple[str, int, int]]:
    """(state, cells, reference models) for each state, the finished first."""
    by_role = {
        role: Counter(frame.loc[(frame["role"] == "cell") == (role == "cell"), "status"])
        for role in ("cell", "reference")
    }
    return [(state, by_role["cell"][state], by_role["reference"][state]) for state in STATES]


def _stated(axis: str, values: Sequence[Any]) -> str:
    return ("; " if axis == "objectives" else ", ").join(axis_value(axis, value) for value in values)


def _task(grid: GridOfCells, store: Store, frame: pd.DataFrame, task: str) -> dict[str, Any]:
    metric = headline(grid, task)
    cells = {cell.fingerprint: cell for cell in grid.cells if cell.task == task}
    first = next(iter(cells.values()))
    evaluation = first.evaluations[0]
    records = {cell.training.start.fingerprint: _start(store, cell) for cell in cells.values()}
    records |= {fingerprint: store.of(cell) for fingerprint, cell in cells.items()}

    @cache
    def written(fingerprint: str) -> Sample | None:
        return recorded_sample(records[fingerprint], evaluation, metric.split("/", 1)[1])

    differences = against_start(frame, metric, task, written)
    best = best_cell(grid, frame, metric, task)
    order = list(frame["task"].unique()).index(task)
    return {
        "name": task,
        "metric": metric,
        "findings": findings(frame, metric, task, written, differences),
        "figures": _figures(grid, store, frame, task, metric, anything=best is not None),
        "beside": beside_the_paper(facts_of(grid, store, frame), task, f"beside{order}"),
        "cost": at_equal_cost(grid, store, frame, metric, task, f"cost{order}"),
        "scores": _scores(frame, metric, task, differences),
        "compared": sum(one.adjusted_p is not None for one in differences),
        "axes": axes_of(frame),
        "best": None if best is None else _named(best),
        "samples": [] if best is None else samples(store, best),
    }


def _start(store: Store, cell: Cell) -> Record:
    return store.artifact(cell.scale, "start", cell.training.start)


def _named(cell: Any) -> str:
    others = [axis for axis in cell.labels if axis not in ("task", "lmbda", "beta", "divergence", "seed")]
    row = {**cell.labels, "lmbda": cell.lmbda, "beta": cell.beta}
    return f"{place(row, others)}, seed {cell.seed}"


def _figures(
    grid: GridOfCells,
    store: Store,
    frame: pd.DataFrame,
    task: str,
    metric: str,
    anything: bool,
) -> dict[str, Markup]:
    """Name -> inline SVG; the SVG is our own and its texts are escaped by matplotlib."""
    drawn: dict[str, Figure] = {}
    if "objectives" not in axes_of(frame):
        drawn["map"] = heat_map(frame, metric, task)
    if anything:
        drawn |= _scores_drawn(frame, metric, task)
    logged = [c for c in grid.cells if c.task == task and store.of(c).metrics_file.exists()]
    if 0 < len(logged) <= MOST_HISTORIES:
        drawn["losses"] = losses(grid, store, task)
    labels = {
        "map": f"Heat map of {metric} on {task} over lambda and divergence",
        "terms": f"{metric} on {task} by the terms of the loss",
        "curves": f"{metric} on {task} against lambda, one line for each divergence",
        "losses": f"Training loss on {task} against the step, for each lambda",
    }
    order = list(frame["task"].unique()).index(task)
    return {
        name: Markup(inline_svg(figure, f"{name}{order}", labels[name])) for name, figure in drawn.items()
    }


def _scores_drawn(frame: pd.DataFrame, metric: str, task: str) -> dict[str, Figure]:
    """Scores by the terms of the loss where they are an axis, else by its divergence."""
    if "objectives" not in axes_of(frame):
        return {"curves": curves(frame, metric, task)}
    here = frame[frame["task"] == task]
    if here["lmbda"].nunique() > 1:
        return {"terms": lines(here, metric, along="lmbda", apart="objectives")}
    return {"terms": bars(here, metric, by="objectives")}


def _scores(
    frame: pd.DataFrame, metric: str, task: str, differences: Sequence[Difference]
) -> list[dict[str, Any]]:
    """Rows of the report's table: the references, then the cells with how they differ from their start."""
    here = frame[frame["task"] == task]
    placed = all_points(here)
    keys = ["role", "lmbda", "beta", *axes_of(frame)]
    rows = []
    for row in summary(here, metric).to_dict("records"):
        same = placed
        for key in keys:
            same = same[same[key].isna() if pd.isna(row[key]) else same[key] == row[key]]
        states = Counter(sorted(same["status"], key=STATES.index))
        rows.append(
            {
                **{str(key): None if pd.isna(value) else value for key, value in row.items()},
                **_told(row),
                "divergence": None if pd.isna(row["beta"]) else divergence_label(row["beta"]),
                "worst": worst(list(states)),
                "difference": _of(differences, row) if row["role"] == "cell" else None,
                "states": ", ".join(
                    state if len(same) == 1 else f"{count} {state}" for state, count in states.items()
                ),
            }
        )
    return rows


def _told(row: Mapping[Any, Any]) -> dict[str, str]:
    """A list of objectives by its terms."""
    stated = row.get("objectives")
    return {"objectives": axis_value("objectives", stated)} if isinstance(stated, str | tuple | list) else {}


def _of(differences: Sequence[Difference], row: Mapping[Any, Any]) -> Difference | None:
    for one in differences:
        if all(_same(row[name], value) for name, value in one.place.items()):
            return one
    return None


def _same(one: Any, other: Any) -> bool:
    return bool(pd.isna(one) and pd.isna(other)) or bool(one == other)
