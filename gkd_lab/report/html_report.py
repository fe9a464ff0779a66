"""HTML report of a grid: one page that stands alone, figures inline, every text escaped."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from gkd_lab.claims.judge import judge_paper, judge_table
from gkd_lab.claims.model_scores import ModelScores
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.claims.verdict_text import (
    format_detail,
    format_effect,
    format_summary,
    format_verdict,
    list_contrast_rows,
    summarize_verdict,
)
from gkd_lab.config import Cell, Grid
from gkd_lab.figures.cost_figures import compute_costs, cost_scatter, describe_omitted_costs
from gkd_lab.figures.heat_maps import heat_map, paired_heat_maps
from gkd_lab.figures.method_figures import bars, lines
from gkd_lab.figures.paper_maps import describe_agreement, pair_maps
from gkd_lab.figures.profiles import draw_interquartile_means, draw_profiles
from gkd_lab.figures.score_curves import curves, loss_curves
from gkd_lab.figures.style import render_inline_svg
from gkd_lab.report.samples import find_best_cell, list_failures, select_samples, summarize_provenance
from gkd_lab.report.summary_text import describe_point, describe_results, format_estimate
from gkd_lab.statistics.aggregates import aggregate_scores
from gkd_lab.statistics.differences import StartDifference, compute_start_differences
from gkd_lab.statistics.example_scores import ExampleLookup, build_example_lookup
from gkd_lab.statistics.summaries import expand_table, summarize_scores
from gkd_lab.store import State, Store, combine_states
from gkd_lab.store.files import write_text
from gkd_lab.tables.divergences import get_divergence
from gkd_lab.tables.grouping import iterate_groups
from gkd_lab.tables.long_table import build_long_table, list_axes
from gkd_lab.tables.loss_labels import METHOD_NAMES, format_axis_value
from gkd_lab.tables.results import name_evaluations
from gkd_lab.tables.rows import get_primary_metric
from gkd_lab.tables.scores import list_score_names, select_primary_scores, select_scores
from gkd_lab.tables.training_facts import describe_epochs, describe_references, list_start_warnings

STATES: tuple[State, ...] = ("done", "running", "failed", "missing")

_POINT_COLUMNS = ("lmbda", "divergence", "beta")
"""Columns that tell grid points apart, besides the axes."""
ROWS_AXIS = "student.sft.rows"
"""Axis of the rows of a student's SFT, on which it is then distilled."""
MAX_LOSS_CURVES = 200
"""Cells of a task whose training histories are still drawn in one figure."""


def write_report(grid: Grid, store: Store, path: Path, *, with_paper: bool | None = None) -> Path:
    """Write the HTML report of a grid to `path`, by rename, and return `path`.

    A grid with nothing done has a report too. with_paper: Show the paper's maps and the verdicts on its
    claims; None: if the experiment names figures or claims of the paper.
    """
    if with_paper is None:
        with_paper = grid.experiment.names_paper
    frame, find_examples = build_long_table(grid, store), build_example_lookup(grid, store)
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
        tasks=[
            _build_task_section(grid, store, frame, task, find_examples, with_paper=with_paper)
            for task in frame["task"].unique()
        ],
        aggregate=_build_aggregate_section(frame),
        claims=_build_claim_rows(grid, frame, find_examples) if with_paper else [],
        references=describe_references(grid, store),
        epochs=describe_epochs(grid),
        warnings=list_start_warnings(grid, store),
        failures=list_failures(grid, store),
        provenance=summarize_provenance(grid, store),
        format_estimate=format_estimate,
    )
    write_text(path, page)
    return path


def _count_states(frame: pd.DataFrame) -> list[tuple[str, int, int]]:
    """Return (state, number of cells, number of reference models) for each state, done first."""
    models = frame.drop_duplicates(["role", "cell"])
    is_cell = models["role"] == "cell"
    cells, references = Counter(models.loc[is_cell, "status"]), Counter(models.loc[~is_cell, "status"])
    return [(state, cells[state], references[state]) for state in STATES]


def _format_axis_values(axis: str, values: Sequence[Any]) -> str:
    """Join the formatted values of an axis by commas, of `objectives` by semicolons."""
    separator = "; " if axis == "objectives" else ", "
    return separator.join(format_axis_value(axis, value) for value in values)


def _build_task_section(
    grid: Grid,
    store: Store,
    frame: pd.DataFrame,
    task: str,
    find_examples: ExampleLookup,
    *,
    with_paper: bool,
) -> dict[str, Any]:
    """Build the template's dict on one task: results, figures, costs, scores, samples."""
    cells = [cell for cell in grid.cells if cell.task == task]
    evaluation, metric = get_primary_metric(cells[0])
    name = name_evaluations(cells[0].evaluations)[evaluation.folder]
    scores = select_scores(frame, metric, name, task)
    differences = compute_start_differences(scores, find_examples)
    best = find_best_cell(grid, scores)
    number = list(frame["task"].unique()).index(task)
    return {
        "name": task,
        "metric": list_score_names(scores)[0],
        "results": describe_results(scores, find_examples, differences),
        "figures": {
            figure_name: _render_svg(figure, f"{figure_name}{number}", label)
            for figure_name, (figure, label) in _draw_figures(grid, store, scores).items()
        },
        "paper": _build_paper_comparison(load_table_scores(frame), task, f"paper{number}")
        if with_paper
        else None,
        "cost": _build_cost_section(grid, store, scores, f"cost{number}"),
        "scores": _build_score_rows(scores, differences, find_examples),
        "comparison_count": sum(difference.adjusted_p_value is not None for difference in differences),
        "difference_methods": list(dict.fromkeys(difference.estimate.method for difference in differences)),
        "axes": list_axes(scores),
        "bar_axis": {"method": "method"}.get(_find_bar_axis(scores) or "", "the terms of the loss"),
        "best": None if best is None else _describe_cell(best),
        "samples": [] if best is None else select_samples(store, best),
    }


def _describe_cell(cell: Cell) -> str:
    """Format a cell's lmbda, divergence, other axes and seed: `λ = 1, JSD(0.1), seed 0`."""
    axes = [axis for axis in cell.labels if axis not in ("task", "lmbda", "beta", "divergence", "seed")]
    row = {**cell.labels, "lmbda": cell.lmbda, "divergence": cell.divergence, "beta": cell.beta}
    return f"{describe_point(row, axes)}, seed {cell.seed}"


def _render_svg(figure: Figure, name: str, label: str) -> Markup:
    """Render a figure as inline SVG that the template does not escape; `name` prefixes its ids."""
    return Markup(render_inline_svg(figure, name, label))


def _draw_figures(grid: Grid, store: Store, scores: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Draw a task's figures, those it has data for: name -> (figure, label for screen readers)."""
    task = str(scores["task"].iloc[0])
    figures = _draw_score_figures(scores, task)
    task_cells = [cell for cell in grid.cells if cell.task == task]
    logged = [cell for cell in task_cells if store.get_record(cell).metrics_file.exists()]
    if 0 < len(logged) <= MAX_LOSS_CURVES:
        label = f"Training loss on {task} against the step, for each lambda"
        figures["losses"] = (loss_curves(grid, store, task), label)
    return figures


def _draw_score_figures(scores: pd.DataFrame, task: str) -> dict[str, tuple[Figure, str]]:
    """Draw the figures of a task's scores: lines over rows, bars of methods, or a map and its curves."""
    metric, (score_name,) = str(scores["metric"].iloc[0]), list_score_names(scores)
    cells = scores[scores["role"] == "cell"]
    has_scores = bool(cells["value"].notna().any())
    bar_axis = _find_bar_axis(scores)
    if _is_grid_of_rows(cells) and has_scores:
        label = f"{score_name} on {task} against the rows of SFT and distillation, one line for each lambda"
        return {"rows": (lines(scores, metric, x_axis=ROWS_AXIS, line_axis="lmbda"), label)}
    if bar_axis is None:
        label = f"Heat map of {score_name} on {task} over lambda and divergence"
        figures = {"map": (heat_map(scores, metric), label)}
        if has_scores:
            label = f"{score_name} on {task} against lambda, one line for each divergence"
            figures["curves"] = (curves(scores, metric), label)
        return figures
    if not has_scores:
        return {}
    is_over_lmbda = cells["lmbda"].nunique() > 1 and bar_axis == "objectives"
    figure = (
        lines(scores, metric, x_axis="lmbda", line_axis=bar_axis)
        if is_over_lmbda
        else bars(scores, metric, bar_axis=bar_axis)
    )
    return {"bars": (figure, f"{score_name} on {task} by {bar_axis}")}


def _is_grid_of_rows(cells: pd.DataFrame) -> bool:
    """Return whether cells differ in rows, lmbda and seed alone, so that lines over the rows show them."""
    is_one_divergence = len(cells[["divergence", "beta"]].drop_duplicates()) == 1
    return list_axes(cells) == [ROWS_AXIS] and is_one_divergence and cells[ROWS_AXIS].nunique() > 1


def _find_bar_axis(scores: pd.DataFrame) -> str | None:
    """Return the axis that tells methods apart instead of lmbda and divergence; None without one."""
    if "method" in list_axes(scores) and set(scores["method"].dropna()) <= set(METHOD_NAMES):
        return "method"
    return "objectives" if "objectives" in list_axes(scores) else None


def _build_paper_comparison(scores: ModelScores, task: str, name: str) -> dict[str, Any] | None:
    """Build figure and sentences on a task's maps beside the paper's; None without a pair."""
    pairs = pair_maps(scores, task)
    if not pairs:
        return None
    label = f"Heat maps of {task}: this run beside the paper"
    return {
        "figure": _render_svg(paired_heat_maps(pairs), name, label),
        "panels": [(pair.title, list(describe_agreement(pair))) for pair in pairs],
    }


def _build_cost_section(grid: Grid, store: Store, scores: pd.DataFrame, name: str) -> dict[str, Any] | None:
    """Build the figure of scores against costs and a sentence on omitted ones, each maybe None.

    Returns None if no cell is done.
    """
    task = str(scores["task"].iloc[0])
    costs = compute_costs(grid, store, task)
    if not costs:
        return None
    figure = cost_scatter(scores, costs)
    label = f"{list_score_names(scores)[0]} on {task} against the cost of training"
    return {
        "figure": None if figure is None else _render_svg(figure, name, label),
        "omitted": describe_omitted_costs(costs),
    }


def _build_score_rows(
    scores: pd.DataFrame, differences: Sequence[StartDifference], find_examples: ExampleLookup
) -> list[dict[str, Any]]:
    """Build a dict per row of the score table: reference models, then grid points, over seeds.

    Cells have their difference from the start.
    """
    axes = list_axes(scores)
    states_by_point = _group_states(expand_table(scores), ["role", *_POINT_COLUMNS, *axes])
    differences_by_point = _index_differences(differences, [*_POINT_COLUMNS, *axes])
    score_rows = []
    for row in summarize_scores(scores, find_examples=find_examples).to_dict("records"):
        point = _build_point_key(row[name] for name in (*_POINT_COLUMNS, *axes))
        models = states_by_point.get((row["role"], *point), [])
        counts = Counter(sorted(models, key=STATES.index))
        states = [state if len(models) == 1 else f"{count} {state}" for state, count in counts.items()]
        score_row = {str(key): None if pd.isna(value) else value for key, value in row.items()}
        if isinstance(score_row.get("objectives"), str | tuple | list):
            score_row["objectives"] = format_axis_value("objectives", score_row["objectives"])
        score_row |= {
            "divergence": get_divergence(row).label if row["role"] == "cell" else None,
            "difference": differences_by_point.get(point) if row["role"] == "cell" else None,
            "worst": combine_states(list(counts)),
            "states": ", ".join(states),
        }
        score_rows.append(score_row)
    return score_rows


def _group_states(points: pd.DataFrame, names: list[str]) -> dict[tuple[Any, ...], list[State]]:
    """Map the values of some columns, None for missing ones, to the states of the rows that have them."""
    states = points["status"].tolist()
    return {
        _build_point_key(values): [states[position] for position in positions]
        for values, positions in iterate_groups(points, names)
    }


def _index_differences(
    differences: Sequence[StartDifference], names: list[str]
) -> dict[tuple[Any, ...], StartDifference]:
    """Map the axis values of each start difference, None for missing ones, to it."""
    return {
        _build_point_key(difference.axis_values[name] for name in names): difference
        for difference in differences
    }


def _build_point_key(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return values as a key, None for missing ones, which are not equal to themselves."""
    return tuple(None if pd.isna(value) else value for value in values)


def _build_aggregate_section(frame: pd.DataFrame) -> dict[str, Any] | None:
    """Build figures over all tasks, or all settings of one; None below two with scores."""
    aggregated = aggregate_scores(select_primary_scores(frame))
    if len(aggregated.tasks) < 2 or not aggregated.methods:
        return None
    task_count = len({name.split(",")[0] for name in aggregated.tasks})
    label = "normalised scores over all tasks, by method"
    return {
        "title": "Over all tasks" if task_count > 1 else "Over all settings",
        "tasks": aggregated.tasks,
        "method": aggregated.methods[0].estimate_interquartile_mean().method,
        "means": _render_svg(draw_interquartile_means(aggregated), "iqm", f"Interquartile means of {label}"),
        "profiles": _render_svg(draw_profiles(aggregated), "profiles", f"Performance profiles: {label}"),
        "omitted": aggregated.omitted,
    }


def _build_claim_rows(grid: Grid, frame: pd.DataFrame, find_examples: ExampleLookup) -> list[dict[str, Any]]:
    """Build a dict per claim that was judged or that the experiment names, beside the paper's."""
    named_claims = grid.experiment.paper.claims
    verdicts = [
        verdict
        for verdict in judge_table(frame, None, find_examples)
        if verdict.columns or verdict.claim.id in named_claims
    ]
    paper_verdicts = judge_paper([verdict.claim.id for verdict in verdicts])
    return [
        {
            **summarize_verdict(verdict),
            "statement": verdict.claim.statement,
            "source": verdict.claim.source,
            "verdict": format_verdict(verdict),
            "effect": format_effect(verdict).split(" [")[0],
            "summary": format_summary(verdict),
            "comparisons": list_contrast_rows(verdict),
            "paper": format_verdict(paper_verdict),
            "paper_detail": format_detail(paper_verdict).split(";")[0] if paper_verdict.columns else "",
        }
        for verdict, paper_verdict in zip(verdicts, paper_verdicts, strict=True)
    ]
