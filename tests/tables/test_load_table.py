"""Long tables of experiments and of files."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import gkd_lab
from gkd_lab import experiments
from gkd_lab.cli import app
from gkd_lab.config import ConfigError
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.table import build_wide_table, encode_table

from .synthetic_store import build_grid, write_finished_record

FILES = (Path(__file__).parents[2] / "analysis" / "tables").glob("*.parquet")
TABLES = sorted(path for path in FILES if not path.stem.endswith(".examples"))


def write_experiment(folder: Path) -> Path:
    """Write an experiment file of two cells."""
    path = folder / "small.yaml"
    path.write_text("{description: made up, task: arithmetic, grid: {lmbda: [0, 1]}}")
    return path


def test_a_name_a_file_and_a_grid_give_the_same_table(tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    grid = experiments.load(str(file), outputs=tmp_path)
    write_finished_record(Store(tmp_path).get_record(grid.cells[0]), grid.cells[0], 50.0)
    frame = gkd_lab.table(grid, outputs=tmp_path)
    assert list(frame[frame["metric"] == "accuracy"]["value"].dropna()) == [50.0]
    pd.testing.assert_frame_equal(gkd_lab.table(str(file), outputs=tmp_path), frame)
    pd.testing.assert_frame_equal(gkd_lab.table(file, outputs=str(tmp_path)), frame)
    named = gkd_lab.table("quickstart", scale="nano", outputs=tmp_path)
    assert set(named["scale"]) == {"nano"} and named["cell"].nunique() == 17


def test_a_parquet_file_reads_back_as_the_table_that_was_written(tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    grid, store = experiments.load(str(file), outputs=tmp_path), Store(tmp_path)
    write_finished_record(store.get_record(grid.cells[0]), grid.cells[0], 50.0)
    path = tmp_path / "table.parquet"
    words = ["table", str(file), "--outputs", str(tmp_path), "--format", "parquet", "-o", str(path)]
    assert CliRunner().invoke(app, words).exit_code == 0
    frame = gkd_lab.table(path)
    pd.testing.assert_frame_equal(frame, build_long_table(grid, store))
    assert frame.attrs["experiment"] == "small" and frame.attrs["origins"][0]["cells"] == 1
    assert encode_table(gkd_lab.wide(frame), "json") == encode_table(build_wide_table(grid, store), "json")


def test_grid_points_of_collapsed_cells_are_read_back(tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1.0]})
    frame, path = build_long_table(grid, Store(tmp_path)), tmp_path / "table.parquet"
    path.write_bytes(encode_table(frame, "parquet"))
    points = [{"task": "arithmetic", "lmbda": 0.0, "sampling_temperature": value} for value in (0.5, 1.0)]
    assert gkd_lab.table(path)["stands_for"].dropna().iloc[0] == points


def test_long_rows_are_written_as_json_and_csv(tmp_path: Path) -> None:
    words = ["table", str(write_experiment(tmp_path)), "--outputs", str(tmp_path / "none"), "--long"]
    rows = json.loads(CliRunner().invoke(app, [*words, "--format", "json"]).stdout)
    assert [(row["role"], row["metric"], row["value"]) for row in rows] == [
        ("start", "accuracy", None), ("teacher", "accuracy", None),
        ("cell", "accuracy", None), ("cell", "accuracy", None),
    ]  # fmt: skip
    assert [row["lmbda"] for row in rows] == [None, None, 0.0, 1.0] and rows[2]["seed"] == 0
    lines = CliRunner().invoke(app, [*words, "--format", "csv"]).stdout.splitlines()
    assert len(lines) == 5 and lines[0].split(",") == list(rows[0])
    refusal = CliRunner().invoke(app, words).exception
    assert isinstance(refusal, ConfigError) and "--long has no Markdown form" in str(refusal)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    for source, expected in (
        (tmp_path / "missing.parquet", "no table"),
        (tmp_path / "text.parquet", "is not a parquet file"),
        (tmp_path / "other.parquet", "is not a long table of gkd-lab: its first columns are a"),
        ("quickstat", "did you mean 'quickstart'"),
    ):
        with pytest.raises(ConfigError, match=expected):
            gkd_lab.table(source, outputs=tmp_path)
    with pytest.raises(ConfigError, match="has its own scale"):
        gkd_lab.table(build_grid(), scale="smol", outputs=tmp_path)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_committed_table_has_the_score_of_every_evaluation_that_is_done(path: Path) -> None:
    table = gkd_lab.table(path)
    requested = table[table["origin"] == "requested"]
    is_done = requested["evaluation_status"] == "done"
    assert is_done.any() and (requested["value"].notna() == is_done).all()
    assert table.attrs["experiment"] == path.stem


def test_public_names_are_loaded_when_they_are_asked_for() -> None:
    code = (
        "import sys, gkd_lab\n"
        "assert 'pandas' not in sys.modules\n"
        "assert callable(gkd_lab.table) and callable(gkd_lab.wide)\n"
        "assert 'torch' not in sys.modules\n"
        "try: gkd_lab.tabel\n"
        "except AttributeError as error: assert 'tabel' in str(error)\n"
        "else: raise SystemExit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
