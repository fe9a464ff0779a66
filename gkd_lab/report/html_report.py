"""HTML report of a grid: one page that stands alone, figures inline, every text escaped."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gkd_lab.claims.judge import judge_paper, judge_table
from gkd_lab.claims.verdict_text import (
    format_detail,
    format_effect,
    format_summary,
    format_verdict,
    list_contrast_rows,
    summarize_verdict,
)
from gkd_lab.config import Cell, Grid
from gkd_lab.figures.cost_figures import describe_omitted_costs
from gkd_lab.figures.grid_figures import (
    GridFigure,
    TaskScores,
    aggregate_tasks,
    collect_task_scores,
    draw_grid_figures,
)
from gkd_lab.figures.inline_svg import render_inline_svg
from gkd_lab.figures.paper_maps import MapPair, describe_agreement
from gkd_lab.report.samples import find_best_cell, list_failure_groups, select_samples, summarize_provenance
from gkd_lab.report.summary_text import describe_point, describe_results, format_estimate
from gkd_lab.statistics.aggregates import AggregatedScores
from gkd_lab.statistics.differences import StartDifference, compute_start_differences
from gkd_lab.statistics.example_scores import ExampleLookup, build_example_lookup
from gkd_lab.statistics.summaries import expand_table, summarize_scores
from gkd_lab.store import State, Store, combine_states
from gkd_lab.store.files import write_text
from gkd_lab.tables.divergences import get_divergence
from gkd_lab.tables.grouping import iterate_groups
from gkd_lab.tables.long_table import build_long_table, list_axes
from gkd_lab.tables.loss_labels import format_axis_value
from gkd_lab.tables.training_facts import describe_epochs, describe_references, list_start_warnings

STATES: tuple[State, ...] = ("done", "running", "failed", "missing")

_POINT_COLUMNS = ("lmbda", "divergence", "beta")
"""Columns that tell grid points apart, besides the axes."""


def write_report(grid: Grid, store: Store, path: Path, *, with_paper: bool | None = None) -> Path:
    """Write the HTML report of a grid to `path`, by rename, and return `path`.

    A grid with nothing done has a report too. with_paper: Show the paper's maps and the verdicts on its
    claims; None: if the experiment names figures or claims of the paper.
    """
    if with_paper is None:
        with_paper = grid.experiment.names_paper
    frame, find_examples = build_long_table(grid, store), build_example_lookup(grid, store)
    tasks = collect_task_scores(grid, store, frame, with_paper=with_paper)
    aggregated = aggregate_tasks(frame)
    figures = _render_figures(draw_grid_figures(grid, store, tasks, aggregated), tasks)
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
        tasks=[_build_task_section(grid, store, task, find_examples, figures[task.task]) for task in tasks],
        aggregate=None if aggregated is None else _build_aggregate_section(aggregated, figures[None]),
        claims=_build_claim_rows(grid, frame, find_examples) if with_paper else [],
        references=describe_references(grid, store),
        epochs=describe_epochs(grid),
        warnings=list_start_warnings(grid, store),
        failures=list_failure_groups(grid, store),
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


def _render_figures(
    figures: Iterable[GridFigure], tasks: Sequence[TaskScores]
) -> dict[str | None, dict[str, Markup]]:
    """Render figures as inline SVG that the template does not escape: task, or None -> kind -> SVG.

    Ids in the SVG begin with the kind and the number of the task.
    """
    numbers: dict[str | None, int | str] = {None: ""} | {task.task: n for n, task in enumerate(tasks)}
    rendered: dict[str | None, dict[str, Markup]] = {task: {} for task in numbers}
    for item in figures:
        name = f"{item.kind}{numbers[item.task]}"
        rendered[item.task][item.kind] = Markup(render_inline_svg(item.figure, name, item.label))
    return rendered


def _build_task_section(
    grid: Grid, store: Store, task: TaskScores, find_examples: ExampleLookup, figures: Mapping[str, Markup]
) -> dict[str, Any]:
    """Build the template's dict on one task: results, figures, costs, scores, samples."""
    scores = task.scores
    differences = compute_start_differences(scores, find_examples)
    best = find_best_cell(grid, scores)
    return {
        "name": task.task,
        "metric": task.score_name,
        "results": describe_results(scores, find_examples, differences),
        "figures": figures,
        "paper": _build_paper_comparison(task.pairs, figures) if task.pairs else None,
        "cost": {"figure": figures.get("cost"), "omitted": describe_omitted_costs(task.costs)}
        if task.costs
        else None,
        "scores": _build_score_rows(scores, differences, find_examples),
        "comparison_count": sum(difference.adjusted_p_value is not None for difference in differences),
        "difference_methods": list(dict.fromkeys(difference.estimate.method for difference in differences)),
        "axes": list_axes(scores),
        "bar_axis": {"method": "method"}.get(task.bar_axis or "", "the terms of the loss"),
        "best": None if best is None else _describe_cell(best),
        "samples": [] if best is None else select_samples(store, best),
    }


def _describe_cell(cell: Cell) -> str:
    """Format a cell's lmbda, divergence, other axes and seed: `λ = 1, JSD(0.1), seed 0`."""
    axes = [axis for axis in cell.labels if axis not in ("task", "lmbda", "beta", "divergence", "seed")]
    row = {**cell.labels, "lmbda": cell.lmbda, "divergence": cell.divergence, "beta": cell.beta}
    return f"{describe_point(row, axes)}, seed {cell.seed}"


def _build_paper_comparison(pairs: Sequence[MapPair], figures: Mapping[str, Markup]) -> dict[str, Any]:
    """Build figure and sentences on a task's maps beside the paper's."""
    panels = [(pair.title, list(describe_agreement(pair))) for pair in pairs]
    return {"figure": figures["paper"], "panels": panels}


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


def _build_aggregate_section(aggregated: AggregatedScores, figures: Mapping[str, Markup]) -> dict[str, Any]:
    """Build the template's dict on all tasks, or all settings of one."""
    task_count = len({name.split(",")[0] for name in aggregated.tasks})
    return {
        "title": "Over all tasks" if task_count > 1 else "Over all settings",
        "tasks": aggregated.tasks,
        "method": aggregated.methods[0].estimate_interquartile_mean().method,
        "means": figures["means"],
        "profiles": figures["profiles"],
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
