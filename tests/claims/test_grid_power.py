"""Power of a planned grid: what is printed is found by `gkd_lab.judge`, and noise is measured rightly."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gkd_lab
from gkd_lab.claims.grid_power import ClaimPower, plan_power
from gkd_lab.claims.noise_sources import find_grid_noise, load_noise, state_noise
from gkd_lab.claims.table_noise import NoiseSource, ScoreNoise, measure_noise
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.config import ConfigError, Grid
from gkd_lab.statistics.example_scores import index_examples
from gkd_lab.statistics.power import Noise, compute_detectable_difference
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store

ACCURACY = {"task": "arithmetic", "metric": "accuracy", "decoding": "greedy", "temperature": None}
EXAMPLES = 50


def build_planned_grid(seeds: int, *claims: str, **document: Any) -> Grid:
    document.setdefault("grid", {"lmbda": [0, 0.5, 1], "beta": [0, 0.5], "seed": list(range(seeds))})
    return build_grid(paper={"claims": list(claims)}, **document)


def plan_one(grid: Grid, source: NoiseSource) -> ClaimPower:
    (planned,) = plan_power(grid, source).claims
    return planned


def list_planned_cells(grid: Grid, tmp_path: Path) -> pd.DataFrame:
    table = build_long_table(grid, Store(tmp_path))
    return table[table["role"] == "cell"].reset_index(drop=True).assign(n_examples=EXAMPLES)


def draw_scores(
    cells: pd.DataFrame, rng: np.random.Generator, seed_noise: float, example_noise: float
) -> tuple[np.ndarray, pd.DataFrame | None]:
    """Draw scores of cells around 50 with independent seeds, and their examples where those are noisy.

    example_noise: standard deviation of two models' difference at one example, equal in all seeds.
    """
    values = 50 + rng.normal(0, seed_noise, len(cells))
    if not example_noise:
        return values, None
    models = cells.groupby(["lmbda", "beta"]).ngroup().to_numpy()
    by_example = rng.normal(0, example_noise / math.sqrt(2), (models.max() + 1, EXAMPLES))
    scores = values[:, None] + by_example[models]
    examples = {
        "cell": np.repeat(cells["cell"].to_numpy(), EXAMPLES),
        **{"evaluation": "greedy", "metric": "accuracy"},
        "example": np.tile(np.arange(EXAMPLES), len(cells)),
        "value": scores.ravel(),
    }
    return scores.mean(axis=1), pd.DataFrame(examples)


# ---- power ----


@pytest.mark.parametrize("example_noise", [0.0, 20.0])
@pytest.mark.parametrize("claim", ["C1", "C3"])
def test_the_printed_difference_is_judged_to_hold_in_four_of_five_runs(
    claim: str, example_noise: float, tmp_path: Path
) -> None:
    """150 runs of two comparisons, within three binomial errors."""
    grid = build_planned_grid(4, claim)
    planned = plan_one(grid, state_noise(1.5, example_noise or None))
    assert (planned.comparisons, planned.seeds, planned.examples) == (2, 4, EXAMPLES)
    cells, rng = list_planned_cells(grid, tmp_path), np.random.default_rng(0)
    found = 0
    for _ in range(150):
        values, examples = draw_scores(cells, rng, 1.5, example_noise)
        shift = planned.holds_from * (cells["lmbda"] == 1).to_numpy()  # type: ignore[operator]
        if examples is not None:
            examples["value"] += np.repeat(shift, EXAMPLES)
        verdicts = gkd_lab.judge(cells.assign(value=values + shift), [claim], examples)
        found += verdicts["verdict"][0] == "holds"
    assert abs(found - 120) < 3 * math.sqrt(150 * 0.8 * 0.2)


def test_the_printed_failure_is_judged_to_fail_in_four_of_five_runs(tmp_path: Path) -> None:
    """One of two comparisons lies below: 150 runs, within three binomial errors."""
    grid = build_planned_grid(4, "C1")
    planned = plan_one(grid, state_noise(1.5))
    cells, rng = list_planned_cells(grid, tmp_path), np.random.default_rng(1)
    shift = np.where(cells["beta"] == 0, planned.fails_from, 9.0) * (cells["lmbda"] == 1)
    verdicts = [
        gkd_lab.judge(cells.assign(value=draw_scores(cells, rng, 1.5, 0)[0] + shift), ["C1"])["verdict"][0]
        for _ in range(150)
    ]
    assert abs(verdicts.count("fails") - 120) < 3 * math.sqrt(150 * 0.8 * 0.2)


def test_one_seed_allows_no_verdict_but_says_what_would() -> None:
    planned = plan_one(build_planned_grid(1, "C1"), state_noise(2.0))
    assert (planned.seeds, planned.holds_from, planned.fails_from) == (1, None, None)
    assert planned.note == "one seed: no verdict is possible, it needs 2 or more"
    assert planned.paper is not None and planned.paper.mean == pytest.approx(2.5467, abs=1e-3)
    assert planned.paper_seeds is not None and planned.paper_seeds > 5


def test_the_seeds_for_the_papers_effect_are_the_fewest_that_show_it() -> None:
    source = state_noise(2.0)
    planned = plan_one(build_planned_grid(2, "C1", grid={"lmbda": [0, 1], "seed": [0, 1]}), source)
    assert planned.paper is not None and planned.paper_seeds is not None
    limits = [
        compute_detectable_difference(Noise(2 * 2.0**2), planned.paper_seeds + more) for more in (-2, 0, 2)
    ]
    assert limits[0] > planned.paper.mean > limits[2]


def test_a_span_of_two_seeds_says_that_it_needs_three() -> None:
    grid = {"student": ["small", "base"], "beta": [0, 1], "seed": [0, 1]}
    planned = plan_one(build_planned_grid(2, "C25", lmbda=1, grid=grid), state_noise(2.0))
    assert planned.note == "2 seeds: no verdict is possible, it needs 3 or more"


def test_measurements_and_claims_about_other_cells_are_named() -> None:
    power = plan_power(build_planned_grid(2, "C1", "C9", "C26"), state_noise(2.0))
    assert [planned.note for planned in power.claims] == [
        "",
        "cannot be judged by this grid: no cells of task translation",
        "is measured, without a verdict",
    ]


def test_without_named_claims_all_that_the_grid_can_judge_are_planned() -> None:
    planned = plan_power(build_planned_grid(2), state_noise(2.0)).claims
    assert {"C1", "C2", "C3"} <= {claim.claim.id for claim in planned}
    assert all(claim.comparisons for claim in planned)


def test_a_grid_without_comparisons_is_refused() -> None:
    grid = build_planned_grid(2, "C9", grid={"lmbda": [1], "seed": [0, 1]})
    with pytest.raises(
        ConfigError, match="made has none: C9: cannot be judged by this grid: no cells of task"
    ):
        plan_power(grid, state_noise(2.0))


# ---- noise ----


def test_measured_components_are_those_that_scores_were_drawn_with(tmp_path: Path) -> None:
    """Six models under 60 seeds."""
    grid = {"lmbda": [0, 0.5, 1], "beta": [0, 0.5], "seed": list(range(60))}
    cells, rng = list_planned_cells(build_grid(grid=grid), tmp_path), np.random.default_rng(2)
    values, examples = draw_scores(cells, rng, 1.5, 20.0)
    by_seed = rng.normal(0, 3.0, 60)[cells["seed"].to_numpy(int)]
    assert examples is not None
    examples["value"] += np.repeat(by_seed, EXAMPLES)
    scores = load_table_scores(cells.assign(value=values + by_seed), index_examples(examples)[0])
    noise = measure_noise(scores, "drawn").find(ACCURACY)
    assert noise is not None and noise.example_variance is not None
    assert math.sqrt(noise.variance) == pytest.approx(1.5, rel=0.1)
    assert math.sqrt(noise.shared_variance) == pytest.approx(3.0, rel=0.2)
    assert math.sqrt(2 * noise.example_variance) == pytest.approx(20.0, rel=0.1)
    assert (noise.example_count, noise.models, noise.seeds, noise.degrees) == (EXAMPLES, 6, 60, 5 * 59)


def test_a_larger_test_set_has_less_noise_of_examples() -> None:
    noise = ScoreNoise(4.0, example_variance=100.0, residual_variance=150.0, example_count=50)
    assert noise.compute_seed_variance(150) == pytest.approx(4.0 - 150 / 50 + 150 / 150)
    assert (noise.compute_example_variance(200), noise.compute_example_variance(None)) == (0.5, 2.0)


def test_models_may_lack_seeds(tmp_path: Path) -> None:
    cells = list_planned_cells(build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]}), tmp_path)
    cells["value"] = [40.0, 41.0, 43.0, 50.0, 51.5, math.nan]
    noise = measure_noise(load_table_scores(cells), "made").find(ACCURACY)
    assert noise is not None
    assert (noise.variance, noise.degrees) == (pytest.approx(0.0625), 1)  # differences of 10 and 10.5


def test_scores_that_are_equal_by_chance_are_as_noisy_as_one_example(tmp_path: Path) -> None:
    cells = list_planned_cells(build_grid(grid={"lmbda": [0, 1], "seed": [0, 1]}), tmp_path)
    noise = measure_noise(load_table_scores(cells.assign(value=98.0)), "made").find(ACCURACY)
    assert noise is not None and 2 * noise.variance == pytest.approx(2.0**2)  # one of 50 is 2 points
    unknown = cells.assign(value=98.0, n_examples=None)
    assert measure_noise(load_table_scores(unknown), "made").by_metric == {}


def test_what_is_done_of_a_grid_gives_its_noise_with_examples(tmp_path: Path) -> None:
    grid = build_planned_grid(3, "C1")
    fill_store(grid, Store(tmp_path), score=lambda cell: 40.0 + 2 * (cell.seed * 7 % 5) * cell.lmbda)
    source = find_grid_noise(grid, tmp_path)
    assert source.text == f"the done cells of made below {tmp_path}"
    noise = source.find(ACCURACY)
    assert noise is not None and noise.example_variance is not None
    assert noise.example_count == EXAMPLES
    planned = plan_one(grid, source)
    assert planned.holds_from is not None and planned.holds_from > 0


def test_one_seed_has_no_noise_and_what_to_give_is_said(tmp_path: Path) -> None:
    grid = build_planned_grid(1, "C1")
    fill_store(grid, Store(tmp_path))
    with pytest.raises(ConfigError, match=r"--noise SD, .* or --noise-from TABLE\.parquet or EXP"):
        find_grid_noise(grid, tmp_path)


def test_a_table_of_other_scores_is_refused(tmp_path: Path) -> None:
    grid = build_planned_grid(2, "C1")
    source = NoiseSource("other.parquet", by_metric={("translation", "bleu"): ScoreNoise(1.0)})
    with pytest.raises(
        ConfigError, match=r"is of translation bleu, not of .* C1: needs the noise of arithmetic"
    ):
        plan_power(grid, source)


def test_the_committed_table_of_the_same_name_is_the_default() -> None:
    source = load_noise("lambda_beta_arithmetic", "nano", Path("none"))
    assert source.text.endswith("analysis/tables/lambda_beta_arithmetic.parquet")
    noise = source.find(ACCURACY)
    assert noise is not None and (noise.models, noise.seeds, noise.degrees) == (15, 5, 56)
