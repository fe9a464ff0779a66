"""Training costs of cells, and the figure of scores against them."""

from pathlib import Path

import pytest

from gkd_lab.figures.cost_figures import (
    compute_costs,
    cost_scatter,
    describe_omitted_costs,
    list_varying_costs,
)
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.scores import select_scores

from ..tables.synthetic_store import build_grid, fill_store, write_finished_record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_costs_are_summed_over_the_history(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 0.5]})
    for cell in grid.cells:
        write_finished_record(store.get_record(cell), cell, 40.0)
        store.get_record(cell).metrics_file.unlink()
        for step in (5, 10):
            store.get_record(cell).log_row(
                {"step": step, "loss": 1.0, "on_policy": cell.lmbda, "completion_length": 6.0}
            )
    costs = compute_costs(grid, store, "arithmetic")
    fixed, mixed = (costs[cell.fingerprint] for cell in grid.cells)
    assert (fixed.generated, fixed.taught, fixed.seconds) == (0.0, 120.0, None)  # 6 tokens, 2 rows, 10 steps
    assert (mixed.generated, mixed.taught) == (60.0, 120.0)
    assert list_varying_costs(costs) == ["generated"]
    omitted = describe_omitted_costs(costs) or ""
    assert "120 in each cell" in omitted
    assert "alone" in omitted
    figure = cost_scatter(select_scores(build_long_table(grid, store), "accuracy"), costs)
    assert figure is not None and len(figure.axes) == 1


def test_costs_that_are_not_recorded_are_omitted(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1]})
    fill_store(grid, store)
    costs = compute_costs(grid, store, "arithmetic")
    assert cost_scatter(select_scores(build_long_table(grid, store), "accuracy"), costs) is None
    assert "no lengths" in (describe_omitted_costs(costs) or "")
