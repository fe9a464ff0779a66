"""Which tables are said to be stale."""

from pathlib import Path

import pandas as pd
import pytest

from gkd_lab import experiments
from gkd_lab.store import Store
from gkd_lab.store.code_hash import _dump_code, compute_code_hash
from gkd_lab.tables import staleness
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.staleness import find_stale_reasons
from gkd_lab.tables.table import encode_table


def write_table(tmp_path: Path, code: str | None, experiment: str = "quickstart") -> Path:
    """Write the table of the quickstart as code with this hash would have."""
    table: pd.DataFrame = build_long_table(experiments.load("quickstart"), Store(tmp_path))
    table.attrs |= {"experiment": experiment, "scale": "nano", "origins": [{"cells": 15, "code": code}]}
    path = tmp_path / "quickstart.parquet"
    path.write_bytes(encode_table(table, "parquet"))
    return path


def test_a_table_of_this_code_and_this_experiment_is_current(tmp_path: Path) -> None:
    assert list(find_stale_reasons(write_table(tmp_path, compute_code_hash()))) == []


@pytest.mark.parametrize("code", ["0123456789abcdef", None])
def test_a_table_of_other_code_is_stale(code: str | None, tmp_path: Path) -> None:
    (reason,) = find_stale_reasons(write_table(tmp_path, code))
    assert reason == f"made by code {code or 'unknown'}, now {compute_code_hash()}"


def test_a_table_of_an_experiment_that_has_changed_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_table(tmp_path, compute_code_hash())
    grid = experiments.load("quickstart", overrides={"seed": "0,1"})
    monkeypatch.setattr(staleness.experiments, "load", lambda name, scale: grid)
    assert list(find_stale_reasons(path)) == ["15 of the 30 cells that its experiment asks for are not in it"]


def test_a_table_without_its_experiment_is_stale(tmp_path: Path) -> None:
    (reason,) = find_stale_reasons(write_table(tmp_path, compute_code_hash(), "gone"))
    assert "its experiment cannot be loaded" in reason


def test_comments_and_docstrings_do_not_change_the_hash_and_code_does() -> None:
    source = 'def add(a, b):\n    """Add."""\n    return a + b  # a sum\n'
    assert _dump_code(source) == _dump_code("def add(a, b):\n    return (a + b)\n")
    assert _dump_code(source) != _dump_code(source.replace("+", "-"))


def test_default_settings_do_not_change_the_hash_because_fingerprints_hold_them() -> None:
    assert _dump_code("SCALES = {1: 2}\nX = 1") == _dump_code("SCALES = {}\nX = 1") == _dump_code("X = 1")
