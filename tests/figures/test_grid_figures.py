"""Which figures a grid has: by its axes, by what is done, with the paper or without."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import Grid
from gkd_lab.figures.grid_figures import GridFigure, aggregate_tasks, collect_task_scores, draw_grid_figures
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store

MAPS = {"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 0.5, 0.9, 1]}


def draw(grid: Grid, store: Store, *, with_paper: bool = False) -> list[GridFigure]:
    table = build_long_table(grid, store)
    tasks = collect_task_scores(grid, store, table, with_paper=with_paper)
    return list(draw_grid_figures(grid, store, tasks, aggregate_tasks(table)))


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"grid": MAPS}, ["arithmetic-heat-map", "arithmetic-curves", "arithmetic-training-loss"]),
        ({"grid": {"method": ["imitkd", "gkd"]}}, ["arithmetic-bars", "arithmetic-training-loss"]),
        (
            {
                "task": None,
                "grid": {"task": ["arithmetic", "translation"], "lmbda": [0, 1], "seed": [0, 1]},
            },
            [
                "all-tasks-interquartile-means", "all-tasks-profiles",
                "arithmetic-heat-map", "arithmetic-curves", "arithmetic-training-loss",
                "translation-heat-map", "translation-curves", "translation-training-loss",
            ],
        ),
    ],
    ids=["map", "methods", "tasks"],
)  # fmt: skip
def test_a_grid_has_the_figures_that_fit_its_axes(
    document: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    grid, store = build_grid(**document), Store(tmp_path)
    fill_store(grid, store)
    assert [figure.name for figure in draw(grid, store)] == names


def test_the_papers_maps_are_drawn_on_request(tmp_path: Path) -> None:
    grid, store = build_grid(grid=MAPS), Store(tmp_path)
    fill_store(grid, store)
    with_paper, without = (
        [figure.kind for figure in draw(grid, store, with_paper=flag)] for flag in (True, False)
    )
    assert set(with_paper) - set(without) == {"paper"}


def test_a_map_without_a_score_shows_no_value(tmp_path: Path) -> None:
    grid, store = build_grid(grid=MAPS), Store(tmp_path)
    assert [(figure.kind, figure.has_data) for figure in draw(grid, store)] == [("map", False)]
    fill_store(grid, store, cells=grid.cells[:1])
    assert [(figure.kind, figure.has_data) for figure in draw(grid, store)] == [
        ("map", True), ("curves", True), ("losses", True),
    ]  # fmt: skip
