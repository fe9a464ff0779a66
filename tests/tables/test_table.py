"""Results table: every cell and reference model is a row, missing and failed ones included."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from gkd_lab.store import Store
from gkd_lab.tables.table import TABLE_FORMATS, build_wide_table, encode_table

from .synthetic_store import build_grid, fill_store, linear_score, write_evaluation, write_finished_record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_a_row_for_every_reference_model_and_cell_in_grid_order(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store)
    frame = build_wide_table(grid, store)
    assert list(frame["role"]) == ["start", "teacher"] + ["cell"] * 9
    assert list(frame["cell"][2:]) == [cell.fingerprint for cell in grid.cells]
    assert frame["cell"][0] == grid.cells[0].training.start.fingerprint
    assert frame["cell"][1] == grid.cells[0].training.teacher.fingerprint
    assert list(frame["lmbda"][2:]) == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]
    assert list(frame["beta"][2:]) == [0, 0.1, 1] * 3
    assert set(frame["status"]) == {"done"}
    assert list(frame["accuracy"][2:]) == [linear_score(cell) for cell in grid.cells]
    assert list(frame["accuracy"][:2]) == [30.0, 95.0]


def test_total_variation_has_no_beta_and_other_axes_have_columns(store: Store) -> None:
    axes = {"divergence": ["jsd", "tv"], "beta": [0, 0.5], "rescale_divergence": [False, True]}
    grid = build_grid(grid=axes)
    fill_store(grid, store)
    frame = build_wide_table(grid, store)
    rows = [row for row in json.loads(encode_table(frame, "json")) if row["role"] == "cell"]
    names = ("divergence", "beta", "rescale_divergence")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("jsd", 0.0, False),
        ("jsd", 0.5, False),
        ("jsd", 0.5, True),
        ("tv", None, False),
    ]
    assert len(rows[3]["stands_for"]) == 4
    for format in TABLE_FORMATS:
        assert encode_table(frame, format)


def test_scores_have_a_short_name_where_a_cell_has_one_evaluation(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store)
    row = build_wide_table(grid, store).iloc[2]
    assert row["greedy/accuracy"] == row["accuracy"] == 40.0
    assert row["greedy/accuracy.low"] == row["accuracy.low"] == 37.0
    assert row["greedy/accuracy.high"] == row["accuracy.high"] == 43.0
    assert row["greedy/mean_length"] == row["mean_length"] == 7.0

    two_evaluations = build_grid(
        evaluations=[{"decoding": "greedy"}, {"decoding": "sample", "temperature": 0.5}]
    )
    fill_store(two_evaluations, store)
    frame = build_wide_table(two_evaluations, store)
    assert frame["sample0.5/accuracy"].notna().all()
    assert "accuracy" not in frame.columns
    assert frame["evaluations"][2] == {"greedy": "done", "sample0.5": "done"}


def test_two_evaluations_of_one_name_have_separate_columns(store: Store) -> None:
    grid = build_grid(
        evaluations=[{"decoding": "greedy", "examples": 10}, {"decoding": "greedy", "examples": 20}]
    )
    fill_store(grid, store)
    names = list(build_wide_table(grid, store)["evaluations"][2])
    assert names == [f"greedy-{e.fingerprint}" for e in grid.cells[0].evaluations]


def test_missing_failed_and_running_cells_are_rows(store: Store) -> None:
    grid = build_grid()
    failed, running, half, judged_badly = grid.cells[:4]
    fill_store(grid, store, cells=grid.cells[5:])
    store.get_record(failed).mark_failed("RuntimeError: first line\nout of memory", "Traceback ...")
    write_finished_record(store.get_record(half), half, 50.0)
    store.get_record(half).get_evaluation(half.evaluations[0]).status_file.unlink()
    write_finished_record(store.get_record(judged_badly), judged_badly, 50.0)
    store.get_record(judged_badly).get_evaluation(half.evaluations[0]).mark_failed("ValueError: no answer")
    with store.get_record(running).lock():
        cells = build_wide_table(grid, store).iloc[2:7].reset_index(drop=True)
    assert list(cells["status"]) == ["failed", "running", "missing", "failed", "missing"]
    assert cells["error"][0] == "out of memory"
    assert cells["error"][3] == "ValueError: no answer"
    assert cells["evaluations"][0] == {"greedy": "missing"}
    assert cells["evaluations"][1] == {"greedy": "running"}
    assert cells["evaluations"][3] == {"greedy": "failed"}
    assert cells["accuracy"].isna().all()


def test_an_empty_store_gives_the_same_columns_and_missing_rows(store: Store) -> None:
    frame = build_wide_table(build_grid(), store)
    assert set(frame["status"]) == {"missing"}
    assert {"greedy/accuracy", "greedy/accuracy.low", "accuracy", "error"} <= set(frame.columns)


def test_reference_rows_hold_the_axis_values_that_all_their_cells_share(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "student": ["small", "base"], "steps": [5, 10]})
    frame = build_wide_table(grid, store)
    references = frame[frame["role"] != "cell"]
    assert list(references["role"]) == ["start", "start", "teacher"]
    assert list(references["student"])[:2] == ["small", "base"]
    assert pd.isna(references["student"].iloc[2])
    assert references["steps"].isna().all()
    cells = frame[frame["role"] == "cell"]
    by_student = cells.groupby("student")["start_cell"].unique()
    assert list(by_student["small"]) == [references["cell"].iloc[0]]
    assert list(by_student["base"]) == [references["cell"].iloc[1]]


def test_a_collapsed_cell_is_one_row_that_lists_its_grid_points(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1.0]})
    cells = build_wide_table(grid, store).query("role == 'cell'")
    assert list(cells["lmbda"]) == [0, 1, 1]
    assert [point["temperature"] for point in cells["stands_for"].iloc[0]] == [0.5, 1.0]
    assert cells["stands_for"].iloc[1:].isna().all()


def test_json_has_nulls_whole_seeds_and_nested_objects(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1.0]})
    fill_store(grid, store, cells=grid.cells[:1])
    rows = json.loads(encode_table(build_wide_table(grid, store), "json"), parse_constant=pytest.fail)
    start, _teacher, first, second, _third = rows
    assert start["role"] == "start"
    assert start["lmbda"] is start["beta"] is start["seed"] is start["stands_for"] is None
    assert first["seed"] == 0 and isinstance(first["seed"], int)
    assert first["lmbda"] == 0 and first["status"] == "done" and first["error"] is None
    assert first["evaluations"] == {"greedy": "done"}
    assert [point["temperature"] for point in first["stands_for"]] == [0.5, 1.0]
    assert second["status"] == "missing" and second["accuracy"] is None


def test_csv_and_parquet_read_back_as_the_same_table(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store, cells=grid.cells[:4])
    frame = build_wide_table(grid, store)
    csv = pd.read_csv(io.BytesIO(encode_table(frame, "csv")))
    parquet = pd.read_parquet(io.BytesIO(encode_table(frame, "parquet")))
    for back in (csv, parquet):
        assert list(back.columns) == list(frame.columns)
        assert list(back["cell"]) == list(frame["cell"])
        assert json.loads(back["evaluations"][2]) == {"greedy": "done"}
        pd.testing.assert_series_equal(back["accuracy"], frame["accuracy"])


def test_markdown_has_a_line_for_each_row_and_no_empty_column(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store, cells=grid.cells[:8])
    store.get_record(grid.cells[8]).mark_failed("ValueError: a | b")
    lines = encode_table(build_wide_table(grid, store), "md").decode().splitlines()
    assert len(lines) == 2 + 2 + 9
    assert "stands_for" not in lines[0]
    assert lines[-1].endswith("| ValueError: a \\| b |")


def test_every_format_encodes_an_empty_store(store: Store) -> None:
    frame = build_wide_table(build_grid(), store)
    for format in TABLE_FORMATS:
        assert encode_table(frame, format)


def test_a_metric_that_an_older_record_lacks_is_null(store: Store) -> None:
    grid = build_grid(evaluations=[{"decoding": "greedy", "metrics": ["accuracy", "exact_match"]}])
    older = (
        build_grid().cells[0].evaluations[0].model_copy(update={"examples": None, "metrics": ("accuracy",)})
    )
    cell = grid.cells[0]
    write_finished_record(store.get_record(cell), cell, 50.0)
    write_evaluation(store.get_record(cell), older, 50.0)
    row = build_wide_table(grid, store).iloc[2]
    assert row["accuracy"] == 50.0 and pd.isna(row["exact_match"])


def test_tables_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'datasets', 'evaluate', 'trl'):\n"
        "    sys.modules[name] = None\n"
        "import gkd_lab.tables.formats\n"
        "assert 'pandas' not in sys.modules\n"
        "import gkd_lab.report.html_report, gkd_lab.figures.heat_maps, gkd_lab.tables.table\n"
        "import gkd_lab.metrics.intervals\n"
        "assert 'scipy' not in sys.modules and 'sacrebleu' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
