"""Scores of the long table are chosen by evaluation and metric, never by parts of a name."""

from pathlib import Path

import pandas as pd
import pytest

from gkd_lab.config import ConfigError, Grid
from gkd_lab.store import Store
from gkd_lab.tables.divergences import CellDivergence, get_divergence, list_divergences, select_divergence
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.scores import list_score_names, select_scores
from gkd_lab.tables.table import build_wide_table

from .synthetic_store import build_grid, fill_store, write_evaluation

TWO_EVALUATIONS = [
    {"decoding": "sample", "temperature": 0.5, "metrics": ["accuracy", "rouge2"]},
    {"decoding": "greedy", "metrics": ["accuracy", "bleu"]},
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def build_two_evaluations(store: Store) -> tuple[Grid, pd.DataFrame]:
    """Build a table with 60 sampled and 70 decoded greedily, in all cells and models."""
    grid = build_grid(grid={"lmbda": [0, 1]}, evaluations=TWO_EVALUATIONS)
    fill_store(grid, store, score=lambda cell: 60.0)
    for cell in grid.cells:
        write_evaluation(store.get_record(cell), cell.evaluations[1], 70.0)  # type: ignore[arg-type]
    return grid, build_long_table(grid, store)


def test_a_metric_is_that_of_the_first_evaluation_that_has_it(store: Store) -> None:
    _, table = build_two_evaluations(store)
    first = select_scores(table, "accuracy")
    assert list(first["role"]) == ["start", "teacher", "cell", "cell"]
    assert list(first["value"]) == [30.0, 95.0, 60.0, 60.0]
    assert set(first["evaluation"]) == {"sample0.5"}
    assert set(select_scores(table, "bleu")["evaluation"]) == {"greedy"}


@pytest.mark.parametrize(
    "arguments", [{"metric": "accuracy", "evaluation": "greedy"}, {"metric": "greedy/accuracy"}]
)
def test_an_evaluation_is_chosen_by_its_name(arguments: dict[str, str], store: Store) -> None:
    _, table = build_two_evaluations(store)
    chosen = select_scores(table, **arguments)
    assert list(chosen["value"]) == [30.0, 95.0, 70.0, 70.0]
    assert list(chosen["low"]) == [27.0, 92.0, 67.0, 67.0]
    assert set(chosen["decoding"]) == {"greedy"} and set(chosen["metric"]) == {"accuracy"}


def test_a_chosen_score_can_be_chosen_again(store: Store) -> None:
    _, table = build_two_evaluations(store)
    scores = select_scores(table, "accuracy", "greedy")
    pd.testing.assert_frame_equal(select_scores(scores, "accuracy"), scores)


def test_tasks_without_the_metric_are_left_out_and_missing_scores_are_not(store: Store) -> None:
    grid = build_grid(grid={"task": ["arithmetic", "translation"], "lmbda": [0, 1]})
    fill_store(grid, store, cells=grid.cells[1:])
    table = build_long_table(grid, store)
    scores = select_scores(table, "accuracy")
    assert set(scores["task"]) == {"arithmetic"}
    assert list(scores["value"].fillna(-1)) == [30.0, 95.0, -1, 68.0]  # 40 + 30 - 4 / 2
    assert set(select_scores(table, "greedy/bleu", task="translation")["task"]) == {"translation"}


def test_a_metric_that_some_models_were_not_asked_for_is_blank_in_them(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 0.5, 1]})
    fill_store(grid, store, cells=grid.cells[1:])
    scores = select_scores(build_long_table(grid, store), "mean_length")
    assert list(scores["value"].fillna(-1)) == [7.0, 7.0, -1, 7.0, 7.0]
    assert list(scores["lmbda"].dropna()) == [0, 0.5, 1]
    assert set(scores["evaluation"]) == {"greedy"}
    assert scores["n_examples"].isna().sum() == 5


def test_training_times_belong_to_no_evaluation(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1]})
    fill_store(grid, store)
    table = build_long_table(grid, store)
    table.loc[table["metric"] == "train_seconds", "value"] = [5.0, 7.0]
    scores = select_scores(table, "train_seconds")
    assert list(scores["value"].fillna(-1)) == [-1, -1, 5.0, 7.0]
    assert list_score_names(table)[0] == "greedy/accuracy" and "train_seconds" in list_score_names(table)


def test_tables_in_one_frame_have_their_own_first_evaluation(store: Store) -> None:
    _, sampled = build_two_evaluations(store)
    decoded = sampled[sampled["evaluation"] == "greedy"]
    table = pd.concat([sampled.assign(of="a"), decoded.assign(of="b")])
    scores = select_scores(table, "accuracy").query("role == 'cell'")
    assert list(scores["value"]) == [60.0, 60.0, 70.0, 70.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "acuracy"}, r"unknown metric 'acuracy'.*sample0\.5/accuracy"),
        (
            {"metric": "accuracy", "evaluation": "beam4"},
            r"'beam4'; valid: sample0\.5, greedy",
        ),
        ({"metric": "rouge2", "evaluation": "greedy"}, "unknown metric of greedy 'rouge2'.*accuracy, bleu"),
        ({"metric": "accuracy", "task": "translation"}, "unknown task 'translation'.*arithmetic"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(
    arguments: dict[str, str], message: str, store: Store
) -> None:
    _, table = build_two_evaluations(store)
    with pytest.raises(ConfigError, match=message):
        select_scores(table, **arguments)


def test_two_scales_duplicated_rows_and_other_tables_are_refused(store: Store) -> None:
    grid, table = build_two_evaluations(store)
    with pytest.raises(ConfigError, match="arithmetic has rows of the scales nano, smol: choose one"):
        select_scores(pd.concat([table, table.assign(scale="smol", cell="other")]), "accuracy")
    with pytest.raises(ConfigError, match=f"{grid.cells[0].fingerprint} has several rows of 'accuracy'"):
        select_scores(pd.concat([table, table[table["cell"] == grid.cells[0].fingerprint]]), "accuracy")
    with pytest.raises(ConfigError, match=r"no long table: it has no column evaluation, .*gkd_lab\.table"):
        select_scores(build_wide_table(grid, store), "accuracy")


def test_divergences_stand_from_forward_to_reverse_kl_then_those_without_beta() -> None:
    kinds = ["uld", "jsd", "tv", "jsd", "cross_entropy", "jsd", "jsd"]
    rows = pd.DataFrame({"divergence": kinds, "beta": [None, 1, None, 0.1, None, 0, 0.1]})
    assert [divergence.label for divergence in list_divergences(rows)] == [
        "Forward KL", "JSD(0.1)", "Reverse KL", "Total variation", "Cross entropy", "Uld",
    ]  # fmt: skip
    assert list(select_divergence(rows, CellDivergence("tv", None)).index) == [2]
    assert list(select_divergence(rows, CellDivergence("jsd", 0.1)).index) == [3, 6]
    assert get_divergence(rows.iloc[4]) == CellDivergence("cross_entropy", None)
