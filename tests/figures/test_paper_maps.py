"""A run's maps beside the paper's: pairing, agreement and the drawn values."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gkd_lab.claims import paper
from gkd_lab.claims.model_scores import ModelScores
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.config import Cell, Grid
from gkd_lab.figures import paired_heat_maps
from gkd_lab.figures.paper_maps import MapPair, describe_agreement, measure_agreement, pair_maps
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store

HEAT_MAP_AXES = {"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 0.5, 0.9, 1]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def read_scores(grid: Grid, store: Store) -> ModelScores:
    return load_table_scores(build_long_table(grid, store))


def get_paper_gain(cell: Cell) -> float:
    rows = (
        paper.load_values()
        .query("figure == 'A.14' and student == 'small'")
        .set_index(["lmbda", "beta"])["gain"]
    )
    return float(rows[(cell.lmbda, cell.beta)])


def fill_heat_map_grid(store: Store, value: Callable[[Cell], float]) -> tuple[Grid, ModelScores]:
    grid = build_grid(grid=HEAT_MAP_AXES)
    fill_store(grid, store, score=value)
    return grid, read_scores(grid, store)


def test_the_papers_numbers_agree_fully_with_themselves(store: Store) -> None:
    _, scores = fill_heat_map_grid(store, lambda cell: 30.0 + get_paper_gain(cell))
    (pair,) = pair_maps(scores, "arithmetic")
    assert (pair.paper_figure, pair.students, pair.is_gain) == ("A.14", "small", True)
    assert pair.run_values == pytest.approx(pair.paper_values)
    agreement = measure_agreement(pair)
    assert (agreement.cells, agreement.same_sign) == (15, 15)
    assert agreement.same_order == agreement.pairs > 90
    assert (agreement.correlation, agreement.low, agreement.high) == pytest.approx((1.0, 1.0, 1.0))


def test_opposite_gains_have_a_correlation_of_minus_one(store: Store) -> None:
    _, scores = fill_heat_map_grid(store, lambda cell: 30.0 - get_paper_gain(cell))
    agreement = measure_agreement(pair_maps(scores, "arithmetic")[0])
    assert (agreement.same_sign, agreement.same_order) == (0, 0)
    assert agreement.correlation == pytest.approx(-1.0)


def test_random_scores_have_an_interval_around_zero(store: Store) -> None:
    noise = random.Random(3)
    _, scores = fill_heat_map_grid(store, lambda cell: 30.0 + noise.random())
    agreement = measure_agreement(pair_maps(scores, "arithmetic")[0])
    assert agreement.low < 0 < agreement.high


def test_equal_cells_have_no_correlation(store: Store) -> None:
    _, scores = fill_heat_map_grid(store, lambda cell: 40.0)
    (pair,) = pair_maps(scores, "arithmetic")
    assert math.isnan(measure_agreement(pair).correlation)
    assert "no rank correlation" in list(describe_agreement(pair))[-1]


def test_differences_within_the_papers_rounding_are_not_ordered() -> None:
    cells = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
    values = dict(zip(cells, [1.0, 1.0, 1.1, 2.0], strict=True))
    pair = MapPair("t", "7", "base", values, values, 0.1, True)
    assert measure_agreement(pair).pairs == 5  # all but the two that are printed alike


def test_an_unnamed_size_is_compared_with_the_mean_of_the_papers_sizes(store: Store) -> None:
    grid = build_grid(grid=HEAT_MAP_AXES, student={"layers": 1, "width": 24, "heads": 1, "sft": {"steps": 1}})
    fill_store(grid, store)
    (pair,) = pair_maps(read_scores(grid, store), "arithmetic")
    assert sorted(pair.students.removeprefix("mean of ").split(", ")) == ["base", "large", "small"]
    assert pair.paper_values[(1.0, 0.0)] == pytest.approx((6.6 + 8.8 + 8.7) / 3)


def test_fewer_than_four_common_cells_are_not_compared(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 0.5, 1]})
    fill_store(grid, store)
    assert pair_maps(read_scores(grid, store), "arithmetic") == []


def test_both_maps_have_the_same_rows_columns_and_printed_values(store: Store) -> None:
    _, scores = fill_heat_map_grid(store, lambda cell: 30.0 + get_paper_gain(cell) + 0.25)
    run_axes, paper_axes, _ = paired_heat_maps(pair_maps(scores, "arithmetic")).axes
    for axes in (run_axes, paper_axes):
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "0.5", "1"]
        assert axes.get_xticklabels()[0].get_text() == "Forward\nKL"
    assert "+6.85" in {text.get_text() for text in run_axes.texts}
    assert "+6.60" in {text.get_text() for text in paper_axes.texts}
