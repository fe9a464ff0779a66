"""Scores against lmbda: gaps, limits and names; losses that were logged once."""

from pathlib import Path

import numpy as np
import pytest

from gkd_lab.figures import curves, loss_curves
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


@pytest.mark.parametrize(("start_score", "side"), [(20, "right"), (72, "left"), (50, "right")])
def test_the_name_of_a_reference_stands_where_no_point_is(
    start_score: float, side: str, tmp_path: Path
) -> None:
    """Scores are 40, 55 and 70 with intervals of 3; the name is written below its line."""
    grid, store = build_grid(grid={"lmbda": [0, 0.5, 1], "beta": [0]}), Store(tmp_path)
    fill_store(grid, store, start_score=start_score)
    (axes,) = curves(build_long_table(grid, store), "accuracy").axes
    (name,) = [text for text in axes.texts if text.get_text().startswith("SFT student")]
    assert name.get_horizontalalignment() == side
    (line,) = [line for line in axes.get_lines() if line.get_label() == "Forward KL"]
    assert name.get_zorder() < line.get_zorder()


def test_an_interval_beyond_all_percentages_ends_at_the_edge_of_the_panel(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 1], "beta": [0], "seed": [0, 1]}), Store(tmp_path)
    fill_store(grid, store, score=lambda cell: 10.0 + 80.0 * cell.seed)  # t interval: 50 +- 508
    (axes,) = curves(build_long_table(grid, store), "accuracy").axes
    assert axes.get_ylim() == (-15, 115)


def test_limits_of_percentages_hold_scores_and_references(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 1], "beta": [0]}), Store(tmp_path)
    fill_store(grid, store, score=lambda _: 0.0, start_score=0.0, teacher_score=50.0)
    (axes,) = curves(build_long_table(grid, store), "accuracy").axes
    low, high = axes.get_ylim()
    assert -15 < low < 0
    assert 50 < high < 60


def test_a_loss_that_was_logged_once_is_seen(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [1], "beta": [0]}), Store(tmp_path)
    record = store.get_record(grid.cells[0])
    record.folder.mkdir(parents=True)
    record.log_row({"step": 20, "loss": 2.0})
    (line,) = loss_curves(grid, store).axes[0].get_lines()
    assert line.get_marker() == "o"
    assert list(line.get_xydata()[0]) == [20, 2]
