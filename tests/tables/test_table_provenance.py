"""Provenance of a table, stored inside its parquet file."""

from pathlib import Path

import pandas as pd
from typer.testing import CliRunner

from gkd_lab.cli import app
from gkd_lab.store import Store
from gkd_lab.tables.table import collect_table_provenance

from .synthetic_store import build_grid, fill_store


def test_cells_are_counted_by_origin(tmp_path: Path) -> None:
    grid, store = build_grid(), Store(tmp_path)
    fill_store(grid, store)
    for n, cell in enumerate(grid.cells[:5]):
        facts = {"commit": "abc" if n < 3 else "def", "packages": {"torch": "2"}, "time": str(n)}
        store.get_record(cell).write_provenance(facts)
    provenance = collect_table_provenance(grid, store)
    assert (provenance["experiment"], provenance["scale"]) == (grid.name, "nano")
    assert [(origin["commit"], origin["cells"]) for origin in provenance["origins"]] == [
        ("abc", 3),
        ("def", 2),
        (None, 4),
    ]
    assert provenance["origins"][0]["packages"] == {"torch": "2"}


def test_a_parquet_file_holds_its_provenance(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    words = [
        "table",
        "quickstart",
        "--outputs",
        str(tmp_path / "none"),
        "--format",
        "parquet",
        "-o",
        str(file),
    ]
    assert CliRunner().invoke(app, words).exit_code == 0
    attributes = {"experiment": "quickstart", "scale": "nano", "origins": [], "axes": []}
    assert pd.read_parquet(file).attrs == attributes
