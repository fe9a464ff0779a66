"""Long tables as strangers build them: other orders, types, names and units; what is refused or named."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gkd_lab
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.config.errors import ConfigError

from .test_judge import TWO, build_examples, build_table, judge_one

TABLES = Path(__file__).parents[2] / "analysis" / "tables"
SCORES = [[40.3, 41.1, 39.8], [45.2, 45.1, 46.0]]


@pytest.mark.parametrize("name", ["quality_diversity", "lambda_beta_summarization", "rl_tradeoff"])
def test_the_order_of_rows_and_columns_says_nothing(name: str) -> None:
    table = gkd_lab.table(TABLES / f"{name}.parquet")
    expected = gkd_lab.judge(table)
    for other in (table.iloc[::-1], table.sort_values("metric"), table.sample(frac=1, random_state=1)):
        verdicts = gkd_lab.judge(other)
        assert list(verdicts["verdict"]) == list(expected["verdict"])
        assert verdicts["effect"].to_numpy() == pytest.approx(expected["effect"].to_numpy(), nan_ok=True)


def test_columns_of_the_design_are_never_axes() -> None:
    table = build_table(SCORES, **TWO)
    shuffled = table[[*reversed(table.columns)]]
    assert judge_one(shuffled, "C1") == judge_one(table, "C1")


def test_a_length_is_no_quality() -> None:
    table = build_table(SCORES, **TWO)
    lengths = table.assign(metric="mean_length", value=100 - table["value"])
    tokens = table.assign(metric="student_tokens", evaluation=None, decoding=None, split=None, value=1.0)
    row = judge_one(pd.concat([tokens, lengths, table]), "C1")
    assert (row["verdict"], row["detail"]) == ("holds", "1 of 1")


@pytest.mark.parametrize("metric", ["acc", "exact_match", "exact_match,strict-match"])
def test_shares_of_a_benchmark_are_points(metric: str) -> None:
    benchmark = {"evaluation": "bbh_fewshot", "decoding": None, "split": None, "metric": metric}
    worse = build_table(np.array(SCORES[::-1]) / 100, [0.5, 1.0], [0.0, 0.0], task="instruction", **benchmark)
    assert judge_one(worse, "C3")["effect"] == pytest.approx(-5.03, abs=0.01)
    assert "no cells with the asked for metric" in judge_one(worse, "C21")["detail"]


def test_shares_of_our_own_metrics_are_named() -> None:
    row = judge_one(build_table(np.array(SCORES) / 100, **TWO), "C1")
    assert row["effect"] == pytest.approx(5.03, abs=0.01)
    assert "accuracy are at most 1" in row["detail"]


def test_a_correlation_may_be_negative() -> None:
    row = judge_one(build_table([[-2.0, 3.0, 1.0], [20.0, 22.0, 21.0]], **TWO, metric="pearson"), "C1")
    assert row["n"] == 3


def add_start(table: pd.DataFrame, scores: dict[str, float]) -> pd.DataFrame:
    """Append rows of SFT students to a table whose cells name them in `start_cell`."""
    starts = table.head(len(scores)).assign(
        cell=list(scores), role="start", value=list(scores.values()), seed=None, lmbda=None, start_cell=None
    )
    return pd.concat([table, starts], ignore_index=True)


def test_starts_that_contradict_each_other_are_left_out() -> None:
    table = build_table(SCORES, **TWO).assign(start_cell="a", beta=0.0)
    assert judge_one(add_start(table, {"a": 30.0}), "C14")["verdict"] == "holds"
    both = pd.concat([add_start(table, {"a": 30.0}), add_start(table, {"a": 80.0}).tail(1)])
    assert "contradict each other" in judge_one(both, "C14")["detail"]
    other = table.assign(start_cell=np.where(table["lmbda"] == 1, "a", "b"))
    assert (
        "differ though their settings" in judge_one(add_start(other, {"a": 30.0, "b": 60.0}), "C14")["detail"]
    )


def test_a_ratio_of_losses_does_not_hold() -> None:
    """GKD loses 5 points where the baselines lose 10: half as much, not 1.9 times the gain."""
    values = [[20.0, 20.3, 19.8], [20.1, 20.0, 19.7], [25.2, 25.1, 24.9]]
    table = build_table(values, [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]).assign(start_cell="a", text="data")
    table.loc[table["cell"].str.startswith("m1"), ["divergence", "text"]] = ["cross_entropy", "teacher"]
    assert judge_one(add_start(table, {"a": 30.0}), "C16")["verdict"] == "fails"


@pytest.mark.parametrize("column", [{"method": "seqkd"}, {"divergence": "nll", "source": "teacher"}])
def test_seqkd_is_recognised_by_its_method_or_source(column: dict[str, str]) -> None:
    table = build_table([[40.3, 41.1, 39.8], [50.2, 50.1, 51.0]], [0.0, 1.0], [0.0, 0.0])
    for name, value in column.items():
        table[name] = np.where(table["lmbda"] == 0, value, table.get(name, "data"))
    assert "SeqKD" not in judge_one(table, "C14")["detail"].split("not in the table")[-1]


def test_equal_names_of_teacher_and_student_are_self_distillation() -> None:
    table = build_table(SCORES, **TWO, student="large", teacher="large")
    assert judge_one(table, "C1")["n"] == 0


def test_samplings_that_share_a_temperature_are_columns_of_their_own() -> None:
    table = build_table(SCORES, **TWO, decoding="sample", temperature=1.0, evaluation="sample1")
    both = pd.concat([table, table.assign(evaluation="sample1x4", value=table["value"] + 1)])
    assert judge_one(both, "C1")["detail"] == "2 of 2"


def test_shares_of_the_data_are_those_of_the_task() -> None:
    values = [[60.1, 60.0, 60.2], [50.1, 50.3, 50.0], [51.0, 50.8, 51.1]]
    table = build_table(values, [1.0, 0.0, 0.5], [0.1, 0.0, 0.0])
    table.insert(table.columns.get_loc("beta") + 1, "train_rows", np.repeat([25, 500, 500], 3))
    larger = table.assign(task="summarization", metric="rouge2", train_rows=table["train_rows"] * 20)
    assert judge_one(pd.concat([table, larger]), "C18")["detail"].startswith("2 of 2")


# ---- intervals of claims ----


def test_the_interval_of_a_failed_claim_covers_its_least_effect() -> None:
    low = [[50, 50, 50, 50], [49, 48.8, 49.1, 48.9], [50, 50, 50, 50], [53, 40, 51, 44]]
    row = judge_one(build_table(low, [0.0, 1.0] * 2, [0.0, 0.0, 1.0, 1.0]), "C1")
    assert row["verdict"] == "fails"
    assert row["low"] < row["effect"] == pytest.approx(-3.0)


def test_a_comparison_of_one_seed_moves_no_upper_end() -> None:
    table = build_table([[50, 50], [55, 40], [50, 50], [45, 45]], [0.0, 1.0] * 2, [0.0, 0.0, 1.0, 1.0])
    one_seed = table[~((table["beta"] == 1) & (table["seed"] == 1))]
    row = judge_one(one_seed, "C1", build_examples(one_seed, 5.0))
    assert (row["verdict"], row["n"]) == ("undecided", 1)
    assert row["low"] <= row["effect"] <= row["high"]


def test_equal_differences_of_all_examples_are_no_proof() -> None:
    table = build_table([[50.0, 50.0, 50.0], [50.0 + 1e-9, 50.0, 50.0]], **TWO)
    examples = build_examples(table, 0.0)
    row = judge_one(table, "C1", examples)
    assert row["verdict"] == "undecided" and row["high"] - row["low"] > 1


# ---- types ----


@pytest.mark.parametrize(
    "column",
    [
        {"seed": [0.0, 1.0, 2.0] * 2},
        {"seed": pd.array([0, 1, 2] * 2, dtype="Int64")},
        {"lmbda": ["0"] * 3 + ["1"] * 3},
        {"value": [Decimal(str(value)) for row in SCORES for value in row]},
        {"role": pd.Categorical(["cell"] * 6)},
        {"stands_for": [np.array([])] * 6},
        {"stands_for": ["abc"] * 6},
        {"n_examples": [0] * 6},
        {"n_examples": [np.inf] * 6},
    ],
)
def test_other_types_mean_the_same(column: dict[str, Any]) -> None:
    row = judge_one(build_table(SCORES, **TWO).assign(**column), "C1")
    assert (row["verdict"], row["n"]) == ("holds", 3)


def test_a_table_read_from_parquet_is_judged_as_it_was(tmp_path: Path) -> None:
    table = gkd_lab.table(TABLES / "baselines.parquet")
    file = tmp_path / "t.parquet"
    table.to_parquet(file)
    assert list(gkd_lab.judge(pd.read_parquet(file))["verdict"]) == list(gkd_lab.judge(table)["verdict"])


def test_a_cell_without_lmbda_is_no_cell_of_a_map() -> None:
    table = build_table(SCORES, **TWO)
    other = table.head(3).assign(lmbda=None, cell=["a", "b", "c"], divergence="cross_entropy", beta=None)
    assert judge_one(pd.concat([table, other]), "C1")["detail"] == "1 of 1"


def test_ids_of_examples_may_be_of_mixed_types() -> None:
    table = build_table(SCORES, **TWO)
    examples = build_examples(table, 5.0, examples=3)
    examples["example"] = [1, "two", (3, 4)] * 6
    assert judge_one(table, "C1", examples)["n_examples"] == 3
    examples["example"] = None
    assert "without an id" in judge_one(table, "C1", examples)["detail"]


def test_examples_of_no_score_are_named() -> None:
    table = build_table(SCORES, **TWO)
    row = judge_one(table, "C1", build_examples(table, 5.0).assign(metric="rouge2"))
    assert "no examples of any score" in row["detail"]


@pytest.mark.parametrize(
    ("column", "value"),
    [({"seed": ["a"] * 6}, "'a'"), ({"seed": [0.5] * 6}, "0.5"), ({"beta": ["forward_kl"] * 6}, "forward_kl"),
     ({"value": ["failed"] * 6}, "failed")],
)  # fmt: skip
def test_text_for_a_number_is_refused(column: dict[str, Any], value: str) -> None:
    with pytest.raises(ConfigError, match=f"column {next(iter(column))}.*{value}"):
        load_table_scores(build_table(SCORES, **TWO).assign(**column))


def test_an_infinite_score_is_left_out() -> None:
    row = judge_one(build_table([[40.3, 41.1, np.inf], SCORES[1]], **TWO, metric="made_up"), "C1")
    assert row["n"] == 2 and "left out: 1 scores outside" in row["detail"]
