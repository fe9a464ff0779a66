"""What a report shows of the paper: maps side by side, claims with both verdicts, scores against cost."""

from typing import Any

import pandas as pd
from markupsafe import Markup

from gkd_lab.claims.definitions import CLAIMS
from gkd_lab.claims.judge import judge_paper
from gkd_lab.claims.measurements import Measurement, extract_measurements
from gkd_lab.claims.run_claims import judge_run, measure_step_seconds
from gkd_lab.claims.verdicts import UNJUDGED_PREFIX, ClaimVerdict, format_effect, format_verdict
from gkd_lab.config import Grid
from gkd_lab.figures.compute_figures import compute_costs, cost_scatter, describe_omitted_costs
from gkd_lab.figures.paper_figures import describe_agreement, pair_maps, paired_heat_maps
from gkd_lab.figures.style import render_inline_svg
from gkd_lab.store import Store


def collect_facts(grid: Grid, store: Store, frame: pd.DataFrame) -> list[Measurement]:
    """The table's scores as claims read them."""
    cells = {cell.fingerprint: cell for cell in grid.cells}
    return extract_measurements(frame, cells, measure_step_seconds(grid, store))


def build_paper_comparison(facts: list[Measurement], task: str, name: str) -> dict[str, Any] | None:
    """Figure and sentences of a task; None where the paper has no such heat map."""
    pairs = pair_maps(facts, task)
    if not pairs:
        return None
    label = f"Heat maps of {task}, ours beside the paper's"
    return {
        "figure": Markup(render_inline_svg(paired_heat_maps(pairs), name, label)),
        "panels": [(pair.title, list(describe_agreement(pair))) for pair in pairs],
    }


def build_cost_section(
    grid: Grid, store: Store, frame: pd.DataFrame, metric: str, task: str, name: str
) -> dict[str, Any] | None:
    """Figure of the scores against what training took, and what is left out; None before anything is done."""
    found = compute_costs(grid, store, task)
    if not found:
        return None
    figure = cost_scatter(frame, metric, task, found)
    label = f"{metric} on {task} against the cost of training"
    return {
        "figure": None if figure is None else Markup(render_inline_svg(figure, name, label)),
        "left_out": describe_omitted_costs(found),
    }


def build_claim_rows(grid: Grid, store: Store) -> list[dict[str, Any]]:
    """A row for each claim that was judged here or that the experiment names, with the paper's verdict."""
    asked = grid.experiment.paper.claims
    found = [one for one in judge_run(grid, store) if one.is_judged or one.claim.id in asked]
    in_paper = {one.claim.id: one for one in judge_paper(CLAIMS[one.claim.id] for one in found)}
    return [_build_claim_row(one, in_paper[one.claim.id]) for one in found]


def _build_claim_row(finding: ClaimVerdict, paper_finding: ClaimVerdict) -> dict[str, Any]:
    return {
        "id": finding.claim.id,
        "statement": finding.claim.statement,
        "where": finding.claim.source,
        "verdict": format_verdict(finding),
        "effect": format_effect(finding),
        "detail": finding.detail.removeprefix(UNJUDGED_PREFIX),
        "paper": format_verdict(paper_finding),
        "paper_detail": paper_finding.detail.split(";")[0] if paper_finding.is_judged else "",
    }
