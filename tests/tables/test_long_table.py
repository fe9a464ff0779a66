"""Long results table: its rows, its typed columns, and its wide form."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gkd_lab import experiments
from gkd_lab.config import Grid
from gkd_lab.config.cell import LmEvalEvaluation
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table, list_axes
from gkd_lab.tables.results import measure_step_seconds
from gkd_lab.tables.table import build_wide_table, encode_table
from gkd_lab.tables.wide_table import wide

from .synthetic_store import build_grid, fill_store, linear_score, write_finished_record

TWO_EVALUATIONS = [
    {"decoding": "sample", "temperature": 0.5, "metrics": ["exact_match", "accuracy"]},
    {"decoding": "greedy", "split": "validation"},
]
LEADING = ["cell", "role", "scale", "task", "student", "teacher", "seed", "lmbda", "divergence", "beta"]
SCORES = ["evaluation", "decoding", "temperature", "split", "metric", "value", "low", "high", "n_examples"]
FACTS = [
    "text", "reward", "distillation_share", "anchor", "self_distillation", "teacher_temperature",
    "learning_rate", "train_rows",
]  # fmt: skip
TRAILING = ["start_cell", "teacher_cell", "stands_for", "status", "error"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def load_facts(name: str, store: Store) -> pd.DataFrame:
    """Return one row per cell of a real experiment, nothing of which has run."""
    long = build_long_table(experiments.load(name, outputs=store.root), store)
    return long[long["role"] == "cell"].drop_duplicates("cell")


def test_a_row_for_every_model_evaluation_and_metric_in_the_order_asked_for(store: Store) -> None:
    grid = build_grid(evaluations=TWO_EVALUATIONS)
    fill_store(grid, store)
    long = build_long_table(grid, store)
    assert (
        list(long.columns[: len(LEADING + SCORES + FACTS + TRAILING)]) == LEADING + SCORES + FACTS + TRAILING
    )
    models = [grid.cells[0].training.start, grid.cells[0].training.teacher, *grid.cells]
    assert list(long["cell"].unique()) == [model.fingerprint for model in models]
    assert list(long["role"].unique()) == ["start", "teacher", "cell"]
    cell = long[long["cell"] == grid.cells[4].fingerprint]
    score = linear_score(grid.cells[4])
    rows = list(zip(cell["evaluation"], cell["metric"], cell["value"], strict=True))
    assert rows[:5] == [
        ("sample0.5", "exact_match", score),
        ("sample0.5", "accuracy", score / 2),
        ("sample0.5", "mean_length", 7.0),
        ("greedy@validation", "accuracy", score),
        ("greedy@validation", "mean_length", 7.0),
    ]
    assert cell[["low", "high", "n_examples"]].iloc[0].tolist() == [score - 3, score + 3, 50]
    assert list(cell["decoding"])[:4] == ["sample"] * 3 + ["greedy"]
    assert list(cell["temperature"])[:3] == [0.5] * 3 and cell["temperature"][3:].isna().all()
    assert list(cell["split"])[:4] == ["test"] * 3 + ["validation"]
    assert list(cell["origin"])[:3] == ["requested", "requested", "stored"]


def test_settings_are_typed_columns_and_null_for_reference_models(store: Store) -> None:
    grid = build_grid(grid={"divergence": ["jsd", "tv"], "beta": [0.1, 1], "seed": [0, 3]})
    long = build_long_table(grid, store)
    rows = long.drop_duplicates("cell").reset_index(drop=True)
    assert list(rows["divergence"][2:]) == ["jsd"] * 4 + ["tv"] * 2
    assert list(rows["beta"][2:6]) == [0.1, 0.1, 1, 1] and rows["beta"][6:].isna().all()
    assert list(rows["seed"][2:]) == [0, 3] * 3 and rows["seed"].dtype == "Int64"
    assert rows.loc[:1, ["seed", "lmbda", "divergence", "beta", *FACTS, *TRAILING[:3]]].isna().all(axis=None)
    assert set(rows["student"]) == {"small"} and set(rows["teacher"]) == {"teacher"}
    assert set(rows["scale"]) == {"nano"}
    types = {"value": "float64", "n_examples": "Int64", "reward": "boolean", "anchor": "str", "error": "str"}
    assert {name: str(long[name].dtype) for name in types} == types
    assert list_axes(long) == []


def test_missing_failed_and_running_models_have_rows_without_a_value(store: Store) -> None:
    grid = build_grid(evaluations=TWO_EVALUATIONS)
    fill_store(grid, store, cells=grid.cells[3:])
    store.get_record(grid.cells[0]).mark_failed("RuntimeError: first line\nout of memory")
    with store.get_record(grid.cells[1]).lock():
        long = build_long_table(grid, store)
    for number, status in enumerate(("failed", "running", "missing")):
        cell = long[long["cell"] == grid.cells[number].fingerprint]
        assert list(cell["metric"]) == ["exact_match", "accuracy", "accuracy"]
        assert set(cell["status"]) == {status} and cell["value"].isna().all()
    assert set(long[long["status"] == "failed"]["error"]) == {"out of memory"}
    assert set(long[long["status"] == "failed"]["evaluation_status"]) == {"missing"}


def test_axes_are_the_columns_between_beta_and_evaluation_and_models_that_vary(store: Store) -> None:
    grid = build_grid(grid={"student": ["small", "base"], "lmbda": [0, 1], "steps": [5, 10], "seed": [0]})
    long = build_long_table(grid, store)
    assert list_axes(long) == ["student", "steps"]
    models = long.drop_duplicates("cell").set_index("cell")
    assert list(models["student"][:2]) == ["small", "base"] and pd.isna(models["student"].iloc[2])
    assert models["steps"].dtype == "Int64" and models["steps"][:3].isna().all()
    tasks = build_grid(grid={"task": ["arithmetic", "translation"], "lmbda": [0, 1]})
    assert list_axes(build_long_table(tasks, store)) == []


def test_an_axis_named_as_a_column_of_scores_has_another_name(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1.0]})
    long = build_long_table(grid, store)
    assert list_axes(long) == ["sampling_temperature"]
    collapsed = long[long["cell"] == grid.cells[0].fingerprint].iloc[0]
    assert [point["sampling_temperature"] for point in collapsed["stands_for"]] == [0.5, 1.0]
    assert list(long[long["lmbda"] == 1]["sampling_temperature"]) == [0.5, 1.0]
    assert long["temperature"].isna().all()


def test_training_times_are_metrics_without_an_evaluation(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store, cells=grid.cells[:4])
    alone, packed, resumed = (store.get_record(cell) for cell in grid.cells[:3])
    alone.write_provenance({"pack": ["a"], "spent": {"seconds": 5.0}})
    packed.write_provenance({"pack": ["a", "b"], "spent": {"seconds": 5.0}})
    resumed.write_provenance({"pack": ["a"], "spent": {"seconds": 5.0}, "resumed_at_step": 4})
    long = build_long_table(grid, store)
    times = long[long["evaluation"].isna()]
    assert list(times["cell"]) == [cell.fingerprint for cell in (grid.cells[0], *grid.cells[:4])]
    assert list(times["metric"]) == ["train_seconds", "step_seconds"] + ["train_seconds"] * 3
    assert list(times["value"]) == [1.0, 0.5, 1.0, 1.0, 1.0]
    assert times[["decoding", "temperature", "split", "origin"]].isna().all(axis=None)
    assert measure_step_seconds(grid, store) == {grid.cells[0].fingerprint: 0.5}


def test_lm_eval_tasks_have_their_name_and_the_task_hash(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store)
    add_lm_eval_scores(grid, store)
    long = build_long_table(grid, store)
    added = long[long["origin"] == "added"]
    failed = added[added["cell"] == grid.cells[2].fingerprint].iloc[0]
    assert (failed["evaluation"], failed["evaluation_status"]) == ("mmlu_5shot", "failed")
    assert pd.isna(failed["metric"]) and pd.isna(failed["value"])
    added = added[added["cell"] == grid.cells[1].fingerprint]
    assert list(added["evaluation"]) == ["mmlu_5shot"] * 2 and list(added["metric"]) == ["acc", "acc_norm"]
    assert list(added["value"]) == [0.25, 0.5] and list(added["n_examples"]) == [100, 100]
    assert set(added["lm_eval"]) == {"0.4"} and set(added["task_hash"]) == {"abc"}
    assert added[["decoding", "temperature", "split"]].isna().all(axis=None)


def add_lm_eval_scores(grid: Grid, store: Store) -> None:
    """Add scores of an lm-eval task to the second cell, and its failure to the third."""
    task = LmEvalEvaluation(lm_eval="0.4", task="mmlu", num_fewshot=5)
    origin = {"n": 100, "lm_eval": "0.4", "task_hash": "abc"}
    scores = {"acc": {"value": 0.25, "low": 0.2, "high": 0.3, **origin}, "acc_norm": {"value": 0.5, **origin}}
    store.get_record(grid.cells[1]).get_evaluation(task).write_results(task, [], scores)
    failed = store.get_record(grid.cells[2]).get_evaluation(task)
    failed.write_spec(task)
    failed.mark_failed("ValueError: no task")


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"grid": {"seed": [0, 1], "lmbda": [0, 1]}, "evaluations": TWO_EVALUATIONS},
        {"grid": {"task": ["arithmetic", "translation"], "student": ["small", "base"], "steps": [5, 10]}},
        {"grid": {"lmbda": [0, 1], "temperature": [0.5, 1.0], "rescale_divergence": [False, True]}},
        {"grid": {"divergence": ["jsd", "tv"], "beta": [0, 0.5]}},
        {"lmbda": 0, "grid": {"objectives": [[{"beta": 0.5}], [{"type": "cross_entropy"}]]}},
        {"evaluations": [{"decoding": "greedy", "examples": 10}, {"decoding": "greedy", "examples": 20}]},
    ],
)
def test_the_wide_form_equals_the_wide_table(document: dict[str, Any], store: Store) -> None:
    grid = build_grid(**document)
    assert_wide_forms_equal(grid, store)
    fill_store(grid, store, cells=grid.cells[1:])
    store.get_record(grid.cells[0]).mark_failed("RuntimeError: out of memory")
    assert_wide_forms_equal(grid, store)
    write_finished_record(store.get_record(grid.cells[-1]), grid.cells[-1], 50.0)
    if len(grid.cells) > 2:
        add_lm_eval_scores(grid, store)
    assert_wide_forms_equal(grid, store)


def assert_wide_forms_equal(grid: Grid, store: Store) -> None:
    """Assert equal columns, values and their kinds: JSON tells true, 1, 1.0 and null apart."""
    expected, actual = build_wide_table(grid, store), wide(build_long_table(grid, store))
    assert list(actual.columns) == list(expected.columns)
    assert encode_table(actual, "json") == encode_table(expected, "json")
    assert encode_table(actual, "md") == encode_table(expected, "md")


def test_rewards_and_rlef_are_told_by_columns(store: Store) -> None:
    facts = load_facts("rl_tradeoff", store)
    assert list(facts["reward"]) == list(facts["alpha"] < 1)
    assert facts["distillation_share"].equals(facts["alpha"].where(facts["reward"]))
    assert list(facts["anchor"].fillna("teacher")) == list(
        facts["method"].map({"gkd": "teacher", "rlef": "start"})
    )


def test_teacher_written_text_and_self_distillation_are_told_by_columns(store: Store) -> None:
    baselines = load_facts("baselines", store)
    texts = baselines.groupby("method")["text"].unique()
    assert {method for method, text in texts.items() if list(text) == ["teacher"]} == {"seqkd"}
    assert not baselines["self_distillation"].any() and not baselines["reward"].any()
    by_method = baselines.groupby("method")["divergence"].first()
    assert (by_method["sft"], by_method["f_distill"], by_method["gkd"]) == ("cross_entropy", "tv", "jsd")
    assert load_facts("self_distillation", store)["self_distillation"].all()


def test_settings_that_are_axes_stand_among_the_axes_alone(store: Store) -> None:
    facts = load_facts("teacher_temperature", store)
    columns = list(facts.columns)
    assert columns.count("teacher_temperature") == 1 and columns.index("teacher_temperature") < 12
    assert list(facts["teacher_temperature"].unique()) == [0.1, 1.0]
    rows = load_facts("data_fraction", store)
    assert sorted(rows["train_rows"].unique()) == [100, 1000, 5000, 20000]
    assert set(load_facts("learning_rate", store)["train_rows"]) == {400}
