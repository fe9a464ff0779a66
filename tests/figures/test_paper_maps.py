"""Ours beside the paper's: the same cells, one scale, and how far they agree."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gkd_lab.claims import paper
from gkd_lab.claims.measurements import Measurement, extract_measurements
from gkd_lab.config import Cell, Grid
from gkd_lab.figures import paired_heat_maps
from gkd_lab.figures.cost_figures import (
    compute_costs,
    cost_scatter,
    describe_omitted_costs,
    list_varying_costs,
)
from gkd_lab.figures.paper_maps import (
    MapPair,
    describe_agreement,
    measure_agreement,
    pair_maps,
)
from gkd_lab.report.html_report import write_report
from gkd_lab.store import Store
from gkd_lab.tables.table import table

from ..tables.synthetic_store import build_grid, fill_store, write_finished_record

HEAT_MAP_AXES = {"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 0.5, 0.9, 1]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def extract(grid: Grid, store: Store) -> list[Measurement]:
    return extract_measurements(table(grid, store), {cell.fingerprint: cell for cell in grid.cells})


def get_paper_gain(cell: Cell) -> float:
    rows = (
        paper.load_values()
        .query("figure == 'A.14' and student == 'small'")
        .set_index(["lmbda", "beta"])["gain"]
    )
    return float(rows[(cell.lmbda, cell.beta)])


def fill_heat_map_grid(store: Store, value: Callable[[Cell], float]) -> tuple[Grid, list[Measurement]]:
    grid = build_grid(grid=HEAT_MAP_AXES)
    fill_store(grid, store, score=value)
    return grid, extract(grid, store)


def test_the_papers_own_numbers_agree_with_themselves(store: Store) -> None:
    _, facts = fill_heat_map_grid(store, lambda cell: 30.0 + get_paper_gain(cell))
    (pair,) = pair_maps(facts, "arithmetic")
    assert (pair.paper_figure, pair.students, pair.is_gain) == ("A.14", "small", True)
    assert pair.run_values == pytest.approx(pair.paper_values)
    found = measure_agreement(pair)
    assert (found.cells, found.same_sign) == (15, 15)
    assert found.same_order == found.pairs > 90
    assert (found.correlation, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_the_opposite_has_a_correlation_of_minus_one(store: Store) -> None:
    _, facts = fill_heat_map_grid(store, lambda cell: 30.0 - get_paper_gain(cell))
    found = measure_agreement(pair_maps(facts, "arithmetic")[0])
    assert (found.same_sign, found.same_order) == (0, 0)
    assert found.correlation == pytest.approx(-1.0)


def test_chance_has_an_interval_that_holds_zero(store: Store) -> None:
    noise = random.Random(3)
    _, facts = fill_heat_map_grid(store, lambda cell: 30.0 + noise.random())
    found = measure_agreement(pair_maps(facts, "arithmetic")[0])
    assert found.low < 0 < found.high


def test_equal_cells_have_no_correlation_and_it_is_said(store: Store) -> None:
    _, facts = fill_heat_map_grid(store, lambda cell: 40.0)
    (pair,) = pair_maps(facts, "arithmetic")
    assert math.isnan(measure_agreement(pair).correlation)
    assert "no rank correlation" in list(describe_agreement(pair))[-1]


def test_differences_within_the_papers_rounding_are_no_order() -> None:
    cells = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
    theirs = dict(zip(cells, [1.0, 1.0, 1.1, 2.0], strict=True))
    pair = MapPair("t", "7", "base", theirs, theirs, 0.1, True)
    assert measure_agreement(pair).pairs == 5  # all but the two that are printed alike


def test_an_unnamed_size_is_held_against_the_mean_of_the_papers(store: Store) -> None:
    grid = build_grid(grid=HEAT_MAP_AXES, student={"layers": 1, "width": 24, "heads": 1, "sft": {"steps": 1}})
    fill_store(grid, store)
    (pair,) = pair_maps(extract(grid, store), "arithmetic")
    assert sorted(pair.students.removeprefix("mean of ").split(", ")) == ["base", "large", "small"]
    assert pair.paper_values[(1.0, 0.0)] == pytest.approx((6.6 + 8.8 + 8.7) / 3)


def test_a_single_row_is_not_compared(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 0.5, 1]})
    fill_store(grid, store)
    assert pair_maps(extract(grid, store), "arithmetic") == []


def test_both_maps_have_the_same_rows_columns_and_printed_values(store: Store) -> None:
    _, facts = fill_heat_map_grid(store, lambda cell: 30.0 + get_paper_gain(cell) + 0.25)
    ours, theirs = paired_heat_maps(pair_maps(facts, "arithmetic")).axes
    for axes in (ours, theirs):
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "0.5", "1"]
        assert next(text.get_text() for text in axes.get_xticklabels()) == "Forward KL"
    assert "+6.85" in {text.get_text() for text in ours.texts}
    assert "+6.60" in {text.get_text() for text in theirs.texts}


def test_costs_are_counted_from_the_history(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 0.5]})
    for cell in grid.cells:
        write_finished_record(store.get_record(cell), cell, 40.0)
        store.get_record(cell).metrics_file.unlink()
        for step in (5, 10):
            store.get_record(cell).log_row(
                {"step": step, "loss": 1.0, "on_policy": cell.lmbda, "completion_length": 6.0}
            )
    found = compute_costs(grid, store, "arithmetic")
    fixed, mixed = (found[cell.fingerprint] for cell in grid.cells)
    assert (fixed.generated, fixed.taught, fixed.seconds) == (0.0, 120.0, None)  # 6 tokens, 2 rows, 10 steps
    assert (mixed.generated, mixed.taught) == (60.0, 120.0)
    assert list_varying_costs(found) == ["generated"]
    left = describe_omitted_costs(found) or ""
    assert "tokens that the teacher judged, 120 in each cell to within 1 %" in left
    assert "no cell was trained alone" in left
    figure = cost_scatter(table(grid, store), "greedy/accuracy", "arithmetic", found)
    assert figure is not None and len(figure.axes) == 1


def test_what_is_not_recorded_is_left_out_and_said(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1]})
    fill_store(grid, store)
    found = compute_costs(grid, store, "arithmetic")
    assert cost_scatter(table(grid, store), "greedy/accuracy", "arithmetic", found) is None
    assert "the histories hold no lengths" in (describe_omitted_costs(found) or "")


def test_the_report_shows_maps_side_by_side_and_the_claims(store: Store, tmp_path: Path) -> None:
    grid = build_grid(grid=HEAT_MAP_AXES, paper={"claims": ["C1", "C9"]})
    fill_store(grid, store)
    page = write_report(grid, store, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Beside the paper" in page and "the paper: Figure A.14" in page
    assert "rank correlation over 15 cells" in page
    claims = page.split("The paper's claims</h2>")[1]
    assert "<td>C1</td>" in claims and "54 of 55" in claims
    assert "no cells of task translation" in claims  # asked for, and why it is not judged
    assert "<td>C20</td>" not in claims
