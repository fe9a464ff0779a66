"""`gkd_lab.judge` on made-up long tables: verdicts, examples, margins, and bad input."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

import gkd_lab
from gkd_lab.config.errors import ConfigError

NOISE = np.random.default_rng(0)


def build_table(values: Any, lmbdas: list[float], betas: list[float], **others: Any) -> pd.DataFrame:
    """Build a long table from scores (models, seeds) of JSD cells."""
    values = np.asarray(values, dtype=float)
    models, seeds = values.shape
    columns: dict[str, Any] = {
        "cell": [f"m{model}s{seed}" for model in range(models) for seed in range(seeds)],
        **{"role": "cell", "scale": "nano", "task": "arithmetic", "student": "small", "teacher": "teacher"},
        "seed": list(range(seeds)) * models,
        "lmbda": np.repeat(lmbdas, seeds),
        "divergence": "jsd",
        "beta": np.repeat(betas, seeds),
        **{"evaluation": "greedy", "decoding": "greedy", "temperature": None, "split": "test"},
        **{"metric": "accuracy", "value": values.ravel(), "n_examples": 200, "status": "done"},
    }
    return pd.DataFrame(columns | others)


def build_examples(table: pd.DataFrame, spread: float, examples: int = 200) -> pd.DataFrame:
    """Build scores of examples whose mean is each row's value."""
    noise = NOISE.normal(0, spread, (len(table), examples))
    values = table["value"].to_numpy()[:, None] + noise - noise.mean(axis=1, keepdims=True)
    return pd.DataFrame(
        {
            "cell": np.repeat(table["cell"].to_numpy(), examples),
            "evaluation": "greedy",
            "metric": "accuracy",
            "example": np.tile(np.arange(examples), len(table)),
            "value": values.ravel(),
        }
    )


def judge_one(table: pd.DataFrame, claim: str, examples: pd.DataFrame | None = None) -> dict[str, Any]:
    """Return the row of one claim."""
    frame = gkd_lab.judge(table, [claim], examples)
    assert list(frame.columns) == [
        "id", "verdict", "effect", "low", "high", "n", "n_examples", "margin", "method", "detail",
    ]  # fmt: skip
    return frame.to_dict("records")[0]


TWO = {"lmbdas": [0.0, 1.0], "betas": [0.5, 0.5]}


def test_without_examples_the_interval_is_over_seeds_and_says_so() -> None:
    row = judge_one(build_table([[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]], **TWO), "C1")
    assert (row["verdict"], row["n"], row["n_examples"]) == ("holds", 3, None)
    assert row["method"] == "t over 3 seeds; noise of the examples not known"


def test_examples_widen_the_interval() -> None:
    table = build_table([[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]], **TWO)
    seeds, both = judge_one(table, "C1"), judge_one(table, "C1", build_examples(table, 60.0))
    assert both["n_examples"] == 200
    assert both["low"] < seeds["low"] and both["effect"] == pytest.approx(seeds["effect"])


def test_examples_that_do_not_give_the_score_are_not_used() -> None:
    table = build_table([[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]], **TWO)
    examples = build_examples(table, 5.0)
    examples["value"] += 1.0
    row = judge_one(table, "C1", examples)
    assert pd.isna(row["n_examples"]) and "stored score" in row["method"]


def test_examples_are_paired_by_their_id() -> None:
    table = build_table([[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]], **TWO)
    examples = build_examples(table, 5.0)
    shuffled = examples.sample(frac=1, random_state=0)
    assert judge_one(table, "C1", shuffled)["low"] == pytest.approx(judge_one(table, "C1", examples)["low"])
    examples.loc[examples["cell"] == "m0s0", "example"] += 1
    assert "different examples" in judge_one(table, "C1", examples)["method"]


def test_as_good_as_holds_for_equal_methods_within_the_margin() -> None:
    rng = np.random.default_rng(1)
    table = build_table(50 + rng.normal(0, 0.65, (2, 10)), [0.5, 1.0], [0.5, 0.5])
    row = judge_one(table, "C3")
    assert (row["verdict"], row["margin"]) == ("holds", 1.3)
    assert -1.3 < row["low"] < 0 < row["high"]


def test_as_good_as_fails_only_below_the_margin() -> None:
    values = [[50.0, 50.4, 49.8, 50.1], [48.0, 48.1, 48.2, 47.9]]
    assert judge_one(build_table(values, [0.5, 1.0], [0.5, 0.5]), "C3")["verdict"] == "fails"
    values = [[50.0, 50.4, 49.8, 50.1], [49.2, 49.3, 49.1, 49.0]]
    row = judge_one(build_table(values, [0.5, 1.0], [0.5, 0.5]), "C3")
    assert (row["verdict"], row["high"] < 0) == ("holds", True)
    values = [[50.0, 50.4, 49.8, 50.1], [48.7, 49.5, 48.1, 49.3]]
    assert judge_one(build_table(values, [0.5, 1.0], [0.5, 0.5]), "C3")["verdict"] == "undecided"


def test_a_claim_of_several_comparisons_is_undecided_only_if_its_interval_has_both_signs() -> None:
    """The worst comparison decides, not the one of the least effect."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        means = rng.normal(50, 1, 5)
        noise = rng.normal(0, 1, (5, 4)) * np.array([0.2, 0.2, 2.0, 0.2, 0.2])[:, None]
        row = judge_one(build_table(means[:, None] + noise, [1.0] * 5, [0, 0.1, 0.5, 0.9, 1]), "C12")
        expected = "holds" if row["low"] > 0 else "fails" if row["high"] < 0 else "undecided"
        assert row["verdict"] == expected
        assert row["low"] <= row["effect"] <= row["high"]


def test_one_failure_by_chance_among_many_comparisons_is_no_failure() -> None:
    """A column at p = 0.012 (two-sided) fails alone, and not among five."""
    low = [[50.0, 50.0, 50.0, 50.0], [48.8, 49.5, 49.0, 49.3]]
    assert judge_one(build_table(low, [0.0, 1.0], [0.5, 0.5]), "C1")["verdict"] == "fails"
    others = [[50.0, 50.5, 49.5, 50.2], [50.1, 50.3, 49.8, 50.3]] * 4
    betas = [0.5, 0.5, 0, 0, 0.1, 0.1, 0.9, 0.9, 1, 1]
    assert judge_one(build_table(low + others, [0.0, 1.0] * 5, betas), "C1")["verdict"] == "undecided"


def test_ends_of_an_lm_eval_share_are_in_points() -> None:
    table = build_table(
        [[0.303, 0.311, 0.298], [0.352, 0.351, 0.360]], **TWO, evaluation="mmlu", decoding=None, metric="acc"
    )
    assert judge_one(table, "C1")["effect"] == pytest.approx(5.03, abs=0.01)


# ---- bad input ----


def test_a_table_of_one_seed_decides_nothing() -> None:
    row = judge_one(build_table([[10.0], [90.0]], **TWO), "C1")
    assert (row["verdict"], row["effect"], row["method"]) == ("undecided", 80.0, "one seed, no interval")


def test_one_example_is_not_used() -> None:
    table = build_table([[40.3, 41.1], [45.2, 45.1]], **TWO)
    row = judge_one(table, "C1", build_examples(table, 1.0, examples=1))
    assert "one example" in row["method"]


def test_missing_scores_are_named_and_the_rest_is_judged() -> None:
    table = build_table(
        [[40.3, 41.1, 39.8], [45.2, 45.1, 46.0], [45.2, 44.1, 46.0]], [0, 1, 1], [0.5, 0.5, 1]
    )
    table.loc[table["beta"] == 1, "value"] = np.nan
    row = judge_one(table, "C1")
    assert (row["verdict"], row["n"]) == ("holds", 3)
    table.loc[table["cell"] == "m1s0", "value"] = np.nan
    row = judge_one(table, "C1")
    assert row["n"] == 2 and "not all models have seed 0" in row["method"]


def test_an_sft_student_that_all_seeds_share_is_named() -> None:
    table = build_table([[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]], **TWO)
    assert "one SFT student" in judge_one(table.assign(start_cell="a"), "C1")["method"]
    own = table.assign(start_cell=[f"start {seed}" for seed in table["seed"]])
    assert "SFT student" not in judge_one(own, "C1")["method"]


def test_examples_of_shares_are_taken_in_points() -> None:
    table = build_table([[40.5, 41.0, 39.5], [45.0, 45.5, 46.0]], **TWO)
    examples = build_examples(table, 20.0)
    expected = judge_one(table, "C1", examples)
    assert judge_one(table, "C1", examples.assign(value=examples["value"] / 100)) == pytest.approx(expected)


def test_seeds_that_do_not_pair_are_named() -> None:
    table = build_table([[40.3, 41.1], [45.2, 45.1]], **TWO)
    table.loc[table["lmbda"] == 1, "seed"] += 2
    row = judge_one(table, "C1")
    assert (row["verdict"], row["n"]) == ("undecided", 0)
    assert "no seed in common" in row["detail"]


def test_repeated_rows_count_once_and_contradicting_ones_are_left_out() -> None:
    table = build_table([[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]], **TWO)
    repeated, once = judge_one(pd.concat([table, table]), "C1"), judge_one(table, "C1")
    assert "left out: 6 repeated rows" in repeated.pop("detail")
    assert repeated == {name: value for name, value in once.items() if name != "detail"}
    other = table[table["cell"] == "m0s0"].assign(cell="other", value=70.0)
    row = judge_one(pd.concat([table, other]), "C1")
    assert row["n"] == 2 and "1 scores that differ" in row["detail"]


def test_a_cell_with_two_method_names_is_no_repeated_row() -> None:
    table = build_table([[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]], **TWO)
    points = [[{"method": name, "beta": 0.5, "seed": seed} for name in ("a", "b")] for seed in [0, 1, 2] * 2]
    table.insert(list(table.columns).index("beta") + 1, "method", "a")
    row = judge_one(table.assign(stands_for=points), "C1")
    assert (row["detail"], row["n"]) == ("1 of 1", 3)


def test_scores_outside_of_their_range_are_left_out_and_named() -> None:
    table = build_table([[40.3, 41.1, 39.8], [45.2, 145.1, 46.0]], **TWO)
    row = judge_one(table, "C1")
    assert row["n"] == 2 and "outside of 0 to 100 (accuracy)" in row["detail"]


def test_repeated_examples_are_named() -> None:
    table = build_table([[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]], **TWO)
    examples = build_examples(table, 5.0)
    row = judge_one(table, "C1", pd.concat([examples, examples.head(200)]))
    assert "repeated examples" in row["detail"] and "some models" in row["method"]


@pytest.mark.parametrize(
    ("table", "claims", "examples", "value"),
    [
        (pd.DataFrame({"cell": ["a"], "accuracy": [1.0]}), ["C1"], None, "role, task, seed"),
        (build_table([[1.0], [2.0]], **TWO), ["C99"], None, "C9"),
        (build_table([[1.0], [2.0]], **TWO), ["C1"], pd.DataFrame({"cell": ["a"]}), "evaluation, metric"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(
    table: pd.DataFrame, claims: list[str], examples: pd.DataFrame | None, value: str
) -> None:
    with pytest.raises(ConfigError, match=value):
        gkd_lab.judge(table, claims, examples)


def test_an_empty_table_gives_reasons() -> None:
    frame = gkd_lab.judge(build_table(np.empty((0, 0)), [], []).head(0))
    assert set(frame["verdict"]) == {"undecided"}
    assert frame["detail"].str.startswith("0 of 0; cannot be judged: ").all()
