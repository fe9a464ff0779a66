"""Where a table's numbers are from, inside the file that keeps them."""

from pathlib import Path

import pandas as pd
from typer.testing import CliRunner

from gkd_lab.cli import app
from gkd_lab.store import Store
from gkd_lab.tables.table import collect_table_provenance

from .synthetic_store import build_grid, fill_store


def test_cells_of_one_origin_are_counted_together_and_others_apart(tmp_path: Path) -> None:
    grid, store = build_grid(), Store(tmp_path)
    fill_store(grid, store)
    for n, cell in enumerate(grid.cells[:5]):
        facts = {"commit": "abc" if n < 3 else "def", "packages": {"torch": "2"}, "time": str(n)}
        store.get_record(cell).write_provenance(facts)
    found = collect_table_provenance(grid, store)
    assert (found["experiment"], found["scale"]) == (grid.name, "nano")
    assert [(one["commit"], one["cells"]) for one in found["origins"]] == [("abc", 3), ("def", 2), (None, 4)]
    assert found["origins"][0]["packages"] == {"torch": "2"}


def test_a_parquet_file_says_where_it_is_from(tmp_path: Path) -> None:
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
    assert pd.read_parquet(file).attrs == {"experiment": "quickstart", "scale": "nano", "origins": []}
