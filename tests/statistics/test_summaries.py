"""Summaries against numbers worked out by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gkd_lab.statistics.effects import compute_t_interval, estimate_bootstrap_effect, estimate_seed_effect
from gkd_lab.statistics.summaries import estimate_lmbda_effect, expand_collapsed_cells, summary
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.scores import select_scores

from ..tables.prediction_records import build_mean_statistics
from ..tables.synthetic_store import build_grid, fill_store


def test_the_t_interval_of_three_values_matches_a_table_of_student_t() -> None:
    # mean 2, standard deviation 1, t(0.975, 2) = 4.30265: half width 4.30265 / sqrt(3)
    low, high = compute_t_interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 2.48414, abs=1e-4)
    assert high == pytest.approx(2 + 2.48414, abs=1e-4)


def test_one_seed_keeps_its_bootstrap_interval_and_several_get_t(tmp_path: Path) -> None:
    store = Store(tmp_path)
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, cells=grid.cells[:4])
    summaries = summary(build_long_table(grid, store), "accuracy").set_index(["role", "lmbda"])
    three, single = summaries.loc[("cell", 0.0)], summaries.loc[("cell", 1.0)]
    assert (three["n"], three["interval"]) == (3, "t, seeds")
    assert three["mean"] == pytest.approx(39.0)
    assert three["high"] - three["mean"] == pytest.approx(2.48414, abs=1e-4)
    assert (single["n"], single["interval"]) == (1, "bootstrap, examples")
    assert (single["low"], single["mean"], single["high"]) == pytest.approx((65.0, 68.0, 71.0))


def test_unfinished_cells_have_no_mean_and_no_interval(tmp_path: Path) -> None:
    summaries = summary(build_long_table(build_grid(), Store(tmp_path)), "accuracy")
    assert (summaries["n"] == 0).all()
    assert (summaries["interval"] == "none").all()
    assert summaries["mean"].isna().all()


def test_a_collapsed_cell_has_a_row_at_each_of_its_grid_points(tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1.0]})
    placed = expand_collapsed_cells(select_scores(build_long_table(grid, Store(tmp_path)), "accuracy"))
    assert list(zip(placed["lmbda"], placed["sampling_temperature"], strict=True)) == [
        (0, 0.5),
        (0, 1.0),
        (1, 0.5),
        (1, 1.0),
    ]
    assert placed["cell"].nunique() == 3


def test_total_variation_has_one_row_after_the_betas(tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "divergence": ["tv", "jsd"], "beta": [0, 1]})
    store = Store(tmp_path)
    fill_store(grid, store)
    frame = build_long_table(grid, store)
    scores = select_scores(frame, "accuracy")
    placed = expand_collapsed_cells(scores)
    assert list(placed["divergence"]) == ["tv", "jsd", "jsd"] * 2
    assert list(placed["beta"].fillna(-1)) == [-1, 0, 1] * 2
    summaries = summary(frame, "accuracy")
    last_tv = summaries[summaries["divergence"] == "tv"].iloc[-1]
    assert (last_tv["lmbda"], last_tv["mean"]) == (1.0, pytest.approx(69.0))  # 40 + 30 - 4 / 4
    assert list(summaries["n"]) == [1] * 8
    effect = estimate_lmbda_effect(scores, lambda cell: None)
    assert effect is not None
    assert (effect.mean, effect.pairs) == (30.0, 3)


def test_a_collapsed_cell_expands_over_axes_of_nested_settings(tmp_path: Path) -> None:
    sizes = [{"layers": 1, "width": width, "heads": 1} for width in (8, 16)]
    grid = build_grid(grid={"lmbda": [0], "temperature": [0.5, 1.0], "student": sizes})
    assert [len(points) for points in grid.stands_for.values()] == [2, 2]
    placed = expand_collapsed_cells(select_scores(build_long_table(grid, Store(tmp_path)), "accuracy"))
    assert placed.groupby(["sampling_temperature", "student"]).size().tolist() == [1] * 4


def test_two_kinds_without_beta_are_not_seeds_of_one(tmp_path: Path) -> None:
    """SeqKD trains with cross-entropy and f-distill with total variation: neither has a beta."""
    grid = build_grid(grid={"method": ["seqkd", "f_distill"], "seed": [0, 1]})
    store = Store(tmp_path)
    fill_store(grid, store, score=lambda cell: 10.0 * cell.seed + (5 if cell.divergence == "tv" else 0))
    frame = build_long_table(grid, store).drop(columns="method")
    cells = summary(frame, "accuracy").query("role == 'cell'")
    assert list(zip(cells["divergence"], cells["mean"], cells["n"], strict=True)) == [
        ("cross_entropy", 5.0, 2),
        ("tv", 10.0, 2),
    ]


def _build_scores(scores: dict[tuple[float, float, int], float | None]) -> pd.DataFrame:
    """Build scores of cells by (lmbda, beta, seed); the fingerprint is `lmbda/beta/seed`."""
    return pd.DataFrame(
        [
            {
                "cell": f"{lmbda:g}/{beta:g}/{seed}",
                "role": "cell",
                "task": "arithmetic",
                "student": "small",
                "teacher": "xl",
                "seed": seed,
                "lmbda": lmbda,
                "divergence": "jsd",
                "beta": beta,
                "evaluation": "greedy",
                "value": value,
                "stands_for": None,
            }
            for (lmbda, beta, seed), value in scores.items()
        ]
    )


def test_with_seeds_the_effect_of_lmbda_is_paired_and_averaged_per_seed() -> None:
    scores = _build_scores(
        {(0, 0, 0): 10.0, (1, 0, 0): 20.0, (0, 1, 0): 10.0, (1, 1, 0): 22.0}
        | {(0, 0, 1): 30.0, (1, 0, 1): 42.0, (0, 1, 1): 30.0, (1, 1, 1): 44.0}
    )
    effect = estimate_lmbda_effect(scores, lambda cell: None)
    assert effect is not None
    assert effect.mean == 12.0  # seeds: 11 and 13; t(0.975, 1) = 12.7062, standard error 1
    assert effect.low == pytest.approx(12 - 12.7062, abs=1e-3)
    assert (effect.pairs, effect.verdict) == (4, "undecided")


def test_with_one_seed_the_effect_is_paired_over_examples() -> None:
    scores = _build_scores({(0, 0, 0): 25.0, (1, 0, 0): 75.0})
    per_example = {"0/0/0": [0.0, 0.0, 0.0, 100.0] * 25, "1/0/0": [100.0, 0.0, 100.0, 100.0] * 25}
    effect = estimate_lmbda_effect(scores, lambda cell: build_mean_statistics(per_example[cell]))
    assert effect is not None and effect.low is not None and effect.high is not None
    assert effect.mean == 50.0
    assert 38 < effect.low < 42 and 58 < effect.high < 62  # 50 +- 1.96 * 50 / sqrt(100)
    assert effect.verdict == "higher"


def test_an_outdated_stored_score_gets_no_interval() -> None:
    scores = _build_scores({(0, 0, 0): 25.0, (1, 0, 0): 75.0})
    effect = estimate_lmbda_effect(scores, lambda cell: build_mean_statistics([1.0, 2.0]))
    assert effect is not None
    assert (effect.low, effect.verdict) == (None, "undecided")


def test_the_p_value_is_student_s() -> None:
    # differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom
    assert estimate_seed_effect([1.0, 2.0, 3.0], 3).p == pytest.approx(0.0742, abs=1e-4)
    assert estimate_seed_effect([0.0, 0.0], 2).p == 1.0
    assert estimate_seed_effect([1.0, 1.0], 2).p == 0.0


def test_interval_and_p_value_over_seeds_are_scipy_s_t_test() -> None:
    from scipy.stats import ttest_1samp

    differences = [0.3, -1.2, 2.5, 0.9]
    effect, expected = estimate_seed_effect(differences, 4), ttest_1samp(differences, 0.0)
    assert effect.p == pytest.approx(expected.pvalue)
    assert (effect.low, effect.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_a_single_example_decides_nothing() -> None:
    effect = estimate_bootstrap_effect(100.0, np.full(10, 100.0), 1, 1, "bootstrap")
    assert (effect.mean, effect.low, effect.p, effect.verdict) == (100.0, None, None, "undecided")


def test_without_a_finished_pair_there_is_no_effect() -> None:
    unfinished, alone = _build_scores({(0, 0, 0): 1.0, (1, 0, 0): None}), _build_scores({(1, 0, 0): 1.0})
    assert estimate_lmbda_effect(unfinished, lambda cell: None) is None
    assert estimate_lmbda_effect(alone, lambda cell: None) is None


def test_two_teachers_are_not_two_seeds_of_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    grid = build_grid()
    fill_store(grid, store)
    frame = build_long_table(grid, store)
    teacher = frame[frame["role"] == "teacher"]
    with_two_teachers = pd.concat([frame, teacher.assign(cell="another", value=10.0)])
    described = summary(with_two_teachers, "accuracy")
    assert sorted(described[described["role"] == "teacher"]["mean"]) == [10.0, 95.0]
    assert list(described["n"]).count(2) == list(summary(frame, "accuracy")["n"]).count(2)
