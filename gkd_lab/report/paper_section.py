"""What a report shows of the paper: maps side by side, claims with both verdicts, scores against cost."""

from typing import Any

import pandas as pd
from markupsafe import Markup

from gkd_lab.claims.definitions import CLAIMS
from gkd_lab.claims.facts import Fact, of_table
from gkd_lab.claims.judge import Finding, judge_paper
from gkd_lab.claims.missing import NOTHING
from gkd_lab.claims.run_claims import judge_run, step_seconds
from gkd_lab.claims.verdict_text import effect_of, verdict_of
from gkd_lab.config import GridOfCells
from gkd_lab.figures.compute_figures import against_cost, costs, left_out
from gkd_lab.figures.paper_figures import beside, beside_map, sentences
from gkd_lab.figures.style import inline_svg
from gkd_lab.store import Store


def facts_of(grid: GridOfCells, store: Store, frame: pd.DataFrame) -> list[Fact]:
    """The table's scores as claims read them."""
    cells = {cell.fingerprint: cell for cell in grid.cells}
    return of_table(frame, cells, step_seconds(grid, store))


def beside_the_paper(facts: list[Fact], task: str, name: str) -> dict[str, Any] | None:
    """Figure and sentences of a task; None where the paper has no such heat map."""
    pairs = beside(facts, task)
    if not pairs:
        return None
    label = f"Heat maps of {task}, ours beside the paper's"
    return {
        "figure": Markup(inline_svg(beside_map(pairs), name, label)),
        "panels": [(pair.title, list(sentences(pair))) for pair in pairs],
    }


def at_equal_cost(
    grid: GridOfCells, store: Store, frame: pd.DataFrame, metric: str, task: str, name: str
) -> dict[str, Any] | None:
    """Figure of the scores against what training took, and what is left out; None before anything is done."""
    found = costs(grid, store, task)
    if not found:
        return None
    figure = against_cost(frame, metric, task, found)
    label = f"{metric} on {task} against the cost of training"
    return {
        "figure": None if figure is None else Markup(inline_svg(figure, name, label)),
        "left_out": left_out(found),
    }


def claim_rows(grid: GridOfCells, store: Store) -> list[dict[str, Any]]:
    """A row for each claim that was judged here or that the experiment names, with the paper's verdict."""
    asked = grid.experiment.paper.claims
    found = [one for one in judge_run(grid, store) if one.judged or one.claim.id in asked]
    in_paper = {one.claim.id: one for one in judge_paper(CLAIMS[one.claim.id] for one in found)}
    return [_row(one, in_paper[one.claim.id]) for one in found]


def _row(ours: Finding, theirs: Finding) -> dict[str, Any]:
    return {
        "id": ours.claim.id,
        "statement": ours.claim.statement,
        "where": ours.claim.where,
        "verdict": verdict_of(ours),
        "effect": effect_of(ours),
        "detail": ours.detail.removeprefix(NOTHING),
        "paper": verdict_of(theirs),
        "paper_detail": theirs.detail.split(";")[0] if theirs.judged else "",
    }
