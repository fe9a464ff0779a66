"""Scores against lmbda: what is missing is a gap in its line."""

from pathlib import Path

import numpy as np

from gkd_lab.figures import curves
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store


def test_a_lmbda_without_a_score_is_a_gap_and_a_divergence_without_any_has_no_line(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 0.5, 1], "beta": [0, 0.5, 1]}), Store(tmp_path)
    done = [cell for cell in grid.cells if cell.beta == 0 or (cell.beta == 0.5 and cell.lmbda != 0.5)]
    fill_store(grid, store, cells=done)
    (axes,) = curves(build_long_table(grid, store), "accuracy").axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
    np.testing.assert_array_equal(lines["Forward KL"], [40, 55, 70])
    np.testing.assert_array_equal(lines["JSD(0.5)"], [38, np.nan, 68])
    assert "Reverse KL" not in lines
