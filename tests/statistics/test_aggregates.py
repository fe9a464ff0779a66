"""Interquartile means and performance profiles: hand values, what is left out, and coverage by simulation."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gkd_lab.config import Cell, Grid
from gkd_lab.statistics.aggregates import (
    MethodScores,
    aggregate_scores,
    compute_interquartile_mean,
)
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.scores import select_primary_scores

from ..tables.synthetic_store import build_grid, fill_store

TWO_TASKS = {"task": ["arithmetic", "translation"], "lmbda": [0, 1], "seed": [0, 1, 2]}


def build_scores(folder: Path, grid: Grid, **options: object) -> pd.DataFrame:
    """Build the scores of a finished grid with a start of 30 and a teacher of 90."""
    fill_store(grid, Store(folder), teacher_score=90.0, **options)  # type: ignore[arg-type]
    return select_primary_scores(build_long_table(grid, Store(folder)))


def make_method(*strata: list[float]) -> MethodScores:
    settings = {"lmbda": 0.5, "divergence": "jsd", "beta": 0.1}
    return MethodScores(settings, [np.array(scores) for scores in strata])


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    assert compute_interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0, 100.0, 4.0, 5.0, -50.0])) == 3.5
    assert compute_interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3.0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 15, 100])
def test_the_interquartile_mean_is_scipy_s_trimmed_mean(count: int) -> None:
    from scipy.stats import trim_mean

    scores = np.random.default_rng(count).normal(size=count)
    assert compute_interquartile_mean(scores) == trim_mean(scores, 0.25)


def test_scores_are_normalised_by_task_between_sft_student_and_teacher(tmp_path: Path) -> None:
    def score(cell: Cell) -> float:
        return 30.0 + 6 * cell.seed + 30 * cell.lmbda * (cell.task == "arithmetic")

    aggregated = aggregate_scores(build_scores(tmp_path, build_grid(task=None, grid=TWO_TASKS), score=score))
    assert (aggregated.tasks, aggregated.omitted) == (["arithmetic", "translation"], [])
    assert [method.label for method in aggregated.methods] == ["λ = 0, JSD(0.5)", "λ = 1, JSD(0.5)"]
    strata = [[scores.tolist() for scores in method.strata] for method in aggregated.methods]
    assert strata == [
        [pytest.approx([0, 0.1, 0.2])] * 2,
        [pytest.approx([0.5, 0.6, 0.7]), pytest.approx([0, 0.1, 0.2])],
    ]
    estimate = aggregated.methods[1].estimate_interquartile_mean()
    assert estimate.effect == pytest.approx((0.1 + 0.2 + 0.5 + 0.6) / 4)
    assert (estimate.seeds, estimate.method) == (3, "2 tasks x 3 seeds, stratified bootstrap")


def test_other_axes_count_as_tasks_and_methods_bear_their_names(tmp_path: Path) -> None:
    axes = {"method": ["imitkd", "gkd"], "beta": [0.1, 1], "student": ["small", "base"]}
    aggregated = aggregate_scores(build_scores(tmp_path, build_grid(grid=axes)))
    assert aggregated.tasks == ["arithmetic, student small", "arithmetic, student base"]
    assert [(method.group, method.label) for method in aggregated.methods] == [
        ("Baselines", "ImitKD"),
        ("On-policy GKD", "On-policy GKD, JSD(0.1)"),
        ("On-policy GKD", "On-policy GKD, Reverse KL"),
    ]
    assert aggregated.methods[0].estimate_interquartile_mean().low() is None  # one seed


def test_what_lacks_a_task_is_left_out_and_named(tmp_path: Path) -> None:
    grid = build_grid(task=None, grid=TWO_TASKS)
    done = [cell for cell in grid.cells if (cell.task, cell.lmbda) != ("translation", 1)]
    aggregated = aggregate_scores(build_scores(tmp_path, grid, cells=done))
    assert [method.label for method in aggregated.methods] == ["λ = 0, JSD(0.5)"]
    assert aggregated.omitted == ["λ = 1, JSD(0.5): no score in translation"]
    assert aggregated.missing == ["λ = 1, JSD(0.5) in translation"]


def test_a_teacher_that_is_no_better_normalises_nothing(tmp_path: Path) -> None:
    aggregated = aggregate_scores(build_scores(tmp_path, build_grid(grid={"lmbda": [0]}), start_score=90.0))
    assert (aggregated.methods, aggregated.tasks) == ([], [])
    assert aggregated.omitted[0].startswith("arithmetic: the teacher")
    assert aggregated.missing == []


def test_a_profile_is_the_share_of_runs_above_each_threshold() -> None:
    """Shares 2/3 and 1 above 0.15: variance (2/9) / 2 of the first task; t(0.975, 4) = 2.77645."""
    share, low, high = make_method([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]).compute_profile(np.array([0, 0.15, 0.8]))
    assert share.tolist() == pytest.approx([1, 5 / 6, 0])
    width = 2.77645 * math.sqrt(2 / 9 / 2) / 2
    assert low.tolist() == pytest.approx([1, 5 / 6 - width, 0], abs=1e-5)
    assert high.tolist() == pytest.approx([1, 1, 0])


@pytest.mark.parametrize(("tasks", "seeds"), [(2, 2), (3, 3), (8, 3)])
@pytest.mark.parametrize("spread", [0.0, 0.6])
def test_intervals_cover_the_interquartile_mean_of_many_seeds(tasks: int, seeds: int, spread: float) -> None:
    """At least 93 % of 200 intervals, three binomial errors below at worst."""
    rng = np.random.default_rng((tasks, seeds, int(10 * spread)))
    means = np.linspace(0.5 - spread / 2, 0.5 + spread / 2, tasks)[:, None]
    truth = compute_interquartile_mean(means + 0.05 * rng.normal(size=(tasks, 50_000)))
    estimates = [
        make_method(*(means + 0.05 * rng.normal(size=(tasks, seeds))).tolist()).estimate_interquartile_mean()
        for _ in range(200)
    ]
    covered = sum(e.low() <= truth <= e.high() for e in estimates)  # type: ignore[operator]
    assert covered > 200 * 0.93 - 3 * math.sqrt(200 * 0.93 * 0.07)
