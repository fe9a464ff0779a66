"""Summaries against numbers worked out by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gkd_lab.statistics.example_scores import (
    ExampleLookup,
    ExampleScores,
    SeedScore,
    average_seed_scores,
    find_no_examples,
)
from gkd_lab.statistics.noise import ScoreSample, estimate_contrast
from gkd_lab.statistics.summaries import (
    estimate_best,
    estimate_lmbda_effect,
    estimate_span,
    expand_collapsed_cells,
    summary,
)
from gkd_lab.store import Store
from gkd_lab.tables.examples import build_examples
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.scores import select_scores

from ..tables.synthetic_store import build_grid, fill_store


def test_one_seed_keeps_its_interval_over_examples_and_several_get_t(tmp_path: Path) -> None:
    """Scores 38, 39, 40: standard deviation 1, t(0.975, 2) = 4.30265, half width 4.30265 / sqrt(3)."""
    store = Store(tmp_path)
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, cells=grid.cells[:4])
    summaries = summary(build_long_table(grid, store), "accuracy").set_index(["role", "lmbda"])
    three, single = summaries.loc[("cell", 0.0)], summaries.loc[("cell", 1.0)]
    assert (three["n"], three["interval"]) == (3, "seeds")
    assert three["mean"] == pytest.approx(39.0)
    assert three["high"] - three["mean"] == pytest.approx(2.48414, abs=1e-4)
    assert (single["n"], single["interval"]) == (1, "examples")
    assert (single["low"], single["mean"], single["high"]) == pytest.approx((65.0, 68.0, 71.0))


def test_sft_students_of_one_seed_each_are_summarized_together(tmp_path: Path) -> None:
    """Scores 30 and 32; the two numbers of rows stay apart."""
    student = {"layers": 1, "width": 8, "heads": 2, "init_seed": "cell", "sft": {"steps": 4}}
    grid = build_grid(student=student, grid={"student.sft.rows": [5, 10], "lmbda": [0, 1], "seed": [0, 1]})
    fill_store(grid, Store(tmp_path))
    table = build_long_table(grid, Store(tmp_path))
    table.loc[(table["role"] == "start") & (table["seed"] == 1), "value"] = 32.0
    starts = summary(table, "accuracy").query("role == 'start'")
    assert list(starts["student.sft.rows"]) == [5, 10]
    assert set(starts["mean"]) == {31.0} and set(starts["n"]) == {2} and set(starts["interval"]) == {"seeds"}


def test_with_examples_the_interval_of_a_mean_covers_them(tmp_path: Path) -> None:
    """Both seeds share 50 examples, so their choice is noise of the mean that seeds do not show."""
    store, grid = Store(tmp_path), build_grid(grid={"lmbda": [0], "seed": [0, 1]})
    fill_store(grid, store, score=lambda cell: 40.0 + 4 * cell.seed)
    table, examples = build_long_table(grid, store), build_examples(grid, store)
    row = summary(table, "accuracy", examples=examples).query("role == 'cell'").iloc[0]
    values = np.array([examples.loc[examples["cell"] == cell.fingerprint, "value"] for cell in grid.cells])
    expected = estimate_contrast(ScoreSample(values.mean(axis=1)[None], values[None]), np.ones(1))
    assert (row["mean"], row["n"], row["interval"]) == (42.0, 2, "seeds x examples")
    assert (row["low"], row["high"]) == pytest.approx((expected.low(), expected.high()))
    seeds_alone = summary(table, "accuracy").query("role == 'cell'").iloc[0]
    assert seeds_alone["interval"] == "seeds"
    assert seeds_alone["high"] - 42 == pytest.approx(12.7062 * 2, abs=1e-3)


def test_seeds_of_equal_scores_have_no_interval(tmp_path: Path) -> None:
    store, grid = Store(tmp_path), build_grid(grid={"lmbda": [0], "seed": [0, 1]})
    fill_store(grid, store, score=lambda cell: 40.0)
    row = summary(build_long_table(grid, store), "accuracy").query("role == 'cell'").iloc[0]
    assert (row["mean"], row["n"], row["interval"]) == (40.0, 2, "none")
    assert pd.isna(row["low"]) and pd.isna(row["high"])


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
    effect = estimate_lmbda_effect(scores, find_no_examples)
    assert effect is not None
    assert (effect[0].effect, effect[1]) == (30.0, 3)


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
                "metric": "accuracy",
                "value": value,
                "n_examples": None,
                "stands_for": None,
            }
            for (lmbda, beta, seed), value in scores.items()
        ]
    )


def make_lookup(**values: list[float]) -> ExampleLookup:
    """Return a lookup of examples' scores by cell."""
    return lambda key: ExampleScores(np.arange(len(values[str(key[0])])), np.array(values[str(key[0])]))


def test_the_effect_of_lmbda_is_paired_and_averaged_per_seed() -> None:
    scores = _build_scores(
        {(0, 0, 0): 10.0, (1, 0, 0): 20.0, (0, 1, 0): 10.0, (1, 1, 0): 22.0}
        | {(0, 0, 1): 30.0, (1, 0, 1): 42.0, (0, 1, 1): 30.0, (1, 1, 1): 44.0}
    )
    effect = estimate_lmbda_effect(scores, find_no_examples)
    assert effect is not None
    estimate, pairs = effect
    assert estimate.effect == 12.0  # seeds: 11 and 13; t(0.975, 1) = 12.7062, standard error 1
    assert estimate.low() == pytest.approx(12 - 12.7062, abs=1e-3)
    assert (pairs, estimate.seeds, estimate.verdict) == (4, 2, "undecided")


def test_with_examples_the_effect_of_lmbda_crosses_them_with_the_seeds() -> None:
    """Differences by seed and example, each the mean of two pairs: [[100, 50, 0, 0], [50, 50, 0, 0]]."""
    values = {
        "0/0/0": [0.0, 0.0, 0.0, 100.0], "1/0/0": [100.0, 100.0, 0.0, 100.0],
        "0/1/0": [0.0, 0.0, 100.0, 100.0], "1/1/0": [100.0, 0.0, 100.0, 100.0],
        "0/0/1": [0.0, 0.0, 0.0, 100.0], "1/0/1": [100.0, 0.0, 0.0, 100.0],
        "0/1/1": [0.0, 0.0, 100.0, 100.0], "1/1/1": [0.0, 100.0, 100.0, 100.0],
    }  # fmt: skip
    scores = _build_scores(
        {
            (lmbda, beta, seed): float(np.mean(values[f"{lmbda}/{beta}/{seed}"]))
            for lmbda in (0, 1)
            for beta in (0, 1)
            for seed in (0, 1)
        }
    )
    effect = estimate_lmbda_effect(scores, make_lookup(**values))
    differences = np.array([[100.0, 50.0, 0.0, 0.0], [50.0, 50.0, 0.0, 0.0]])
    expected = estimate_contrast(ScoreSample(np.zeros((1, 2)), differences[None]), np.ones(1))
    assert effect == (expected, 4)
    assert expected.method == "2 seeds x 4 examples, crossed"


def test_with_one_seed_the_effect_is_paired_over_examples_and_decides_nothing() -> None:
    scores = _build_scores({(0, 0, 0): 25.0, (1, 0, 0): 75.0})
    lookup = make_lookup(**{"0/0/0": [0.0, 0.0, 0.0, 100.0] * 25, "1/0/0": [100.0, 0.0, 100.0, 100.0] * 25})
    effect = estimate_lmbda_effect(scores, lookup)
    assert effect is not None
    estimate, _ = effect
    # 50 of 100 examples differ by 100: standard deviation 50.252, t(0.975, 99) = 1.98422
    assert (estimate.low(), estimate.high()) == pytest.approx((50 - 9.9711, 50 + 9.9711), abs=1e-3)
    assert (estimate.method, estimate.verdict) == ("one seed: 100 examples only", "undecided")


def test_an_outdated_stored_score_gets_no_interval_over_examples() -> None:
    scores = _build_scores({(0, 0, 0): 25.0, (1, 0, 0): 75.0})
    effect = estimate_lmbda_effect(scores, make_lookup(**{"0/0/0": [1.0, 2.0], "1/0/0": [1.0, 2.0]}))
    assert effect is not None
    assert (effect[0].low(), effect[0].method) == (None, "one seed, no interval")


def test_without_a_finished_pair_there_is_no_effect() -> None:
    unfinished, alone = _build_scores({(0, 0, 0): 1.0, (1, 0, 0): None}), _build_scores({(1, 0, 0): 1.0})
    assert estimate_lmbda_effect(unfinished, find_no_examples) is None
    assert estimate_lmbda_effect(alone, find_no_examples) is None


def test_the_best_and_the_span_of_equal_models_lose_most_of_what_choosing_adds() -> None:
    """Five models of mean 50 and standard deviation 1 over 4 seeds: naive best 50.58, naive span 1.16."""
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(60):
        scores = _build_scores({(1, beta, seed): rng.normal(50, 1) for beta in range(5) for seed in range(4)})
        groups = [group for _, group in scores.groupby("beta")]
        means = [group["value"].mean() for group in groups]
        best, span = estimate_best(groups, find_no_examples), estimate_span(groups, find_no_examples)
        assert best is not None and span is not None and span.low() is not None
        estimates.append((max(means), best.effect, max(means) - min(means), span.effect))
    naive_best, best_mean, naive_span, span_mean = np.mean(estimates, axis=0)
    assert (naive_best, naive_span) == pytest.approx((50.58, 1.16), abs=0.15)
    assert best_mean - 50 < 0.4 * (naive_best - 50)
    assert span_mean < 0.4 * naive_span


def test_two_seeds_tell_no_span() -> None:
    scores = _build_scores({(1, beta, seed): 50.0 + beta + seed for beta in range(2) for seed in range(2)})
    span = estimate_span([group for _, group in scores.groupby("beta")], find_no_examples)
    assert span is not None
    assert (span.effect, span.low()) == (1.0, None)


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


@pytest.mark.parametrize("has_examples", [False, True])
def test_one_model_for_each_seed_is_averaged_as_several_are(has_examples: bool) -> None:
    """The short way, without weights, gives the bits of the general one."""
    generator = np.random.default_rng(0)
    tables = {f"{model}{seed}": generator.uniform(0, 100, 20) for model in "abc" for seed in (3, 1, 2)}
    find_examples = make_lookup(**{name: list(values) for name, values in tables.items()})
    groups = [
        [
            (int(name[1]), SeedScore(float(values.mean()), key=(name, "greedy", "accuracy")))
            for name, values in tables.items()
            if name[0] == model
        ]
        for model in "abc"
    ]
    lookup = find_examples if has_examples else find_no_examples
    short = average_seed_scores(groups, lookup)
    twice = average_seed_scores([group * 2 for group in groups], lookup)
    assert short is not None and twice is not None
    expected = [[tables[f"{model}{seed}"].mean() for seed in (1, 2, 3)] for model in "abc"]
    assert short.seed_scores == pytest.approx(np.array(expected))
    assert short.seed_scores == pytest.approx(twice.seed_scores, rel=1e-14)
    assert (short.example_scores is not None) == (twice.example_scores is not None) == has_examples
    if short.example_scores is not None and twice.example_scores is not None:
        assert short.example_scores == pytest.approx(twice.example_scores, rel=1e-14)
        assert short.example_scores[1, 2].tolist() == tables["b3"].tolist()
