"""An estimate is what finished cells of the same kind took, scaled; else it is counted."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import Cell, Grid
from gkd_lab.config.artifact_specs import ModelSpec
from gkd_lab.config.cost import NOMINAL_FLOPS_PER_SECOND, estimate_training_flops
from gkd_lab.status.overview import Overview, build_overview
from gkd_lab.status.render import render_summary
from gkd_lab.status.time_estimates import TimeEstimator, create_estimator
from gkd_lab.store import Store

from ..tables.synthetic_store import build_grid


def finish(store: Store, cell: Cell, seconds: float, shared_by: int = 1, device: str = "cpu") -> None:
    record = store.get_record(cell)
    record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    record.finish(steps=cell.training.steps, seconds=seconds, shared_by=shared_by, device=device)


def estimator(grid: Grid, store: Store) -> TimeEstimator:
    return create_estimator(
        ((cell, store.get_record(cell).read_status()) for cell in grid.cells), store, grid.scale
    )


def seconds(found: TimeEstimator, cell: Cell, *, packed: bool = False) -> float:
    estimate = found.estimate_cell(cell.training, is_packed=packed)
    assert estimate.seconds is not None
    return estimate.seconds


def test_without_finished_cells_it_is_counted_at_the_nominal_rate(tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0]})
    (cell,) = grid.cells
    found = estimator(grid, Store(tmp_path))
    flops = estimate_training_flops(cell.training)
    assert flops is not None
    assert seconds(found, cell) == flops / NOMINAL_FLOPS_PER_SECOND
    assert found.estimate_cell(cell.training, is_packed=False).basis == "FLOPs"
    assert found.describe_source() is None


def test_it_scales_what_a_finished_cell_took_by_steps_and_by_the_share_of_sampling(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 1], "steps": [10, 30]}), Store(tmp_path)
    short, *_ = grid.cells
    assert (short.lmbda, short.training.steps) == (0, 10)
    finish(store, short, 4.0)
    found = estimator(grid, store)
    for cell in grid.cells:
        share = estimate_training_flops(cell.training) / estimate_training_flops(short.training)  # type: ignore[operator]
        assert seconds(found, cell) == pytest.approx(4 * share)
        assert share >= cell.training.steps / 10
    assert found.describe_source() == "1 finished cell of the same kind (cpu)"


def test_a_cell_of_a_pack_took_its_share_and_says_nothing_of_one_alone(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"beta": [0, 0.5, 1]}), Store(tmp_path)
    for cell in grid.cells[:2]:
        finish(store, cell, 6.0, shared_by=3)
    found = estimator(grid, store)
    assert seconds(found, grid.cells[2], packed=True) == pytest.approx(2.0)
    assert found.estimate_cell(grid.cells[2].training, is_packed=True).basis == "finished cells"
    assert found.estimate_cell(grid.cells[2].training, is_packed=False).basis == "FLOPs"


@pytest.mark.parametrize("other", [{"student": "base"}, {"precision": "bf16"}, {"max_output_tokens": 16}])
def test_a_cell_of_another_kind_teaches_nothing(other: dict[str, Any], tmp_path: Path) -> None:
    store, (known,) = Store(tmp_path), build_grid(grid={"lmbda": [0]}).cells
    finish(store, known, 4.0)
    grid = build_grid(grid={"lmbda": [0]}, **other)
    assert estimator(grid, store).estimate_cell(grid.cells[0].training, is_packed=False).basis == "FLOPs"


def test_another_experiments_cell_of_the_same_kind_is_found(tmp_path: Path) -> None:
    store, (known,) = Store(tmp_path), build_grid(grid={"seed": [7]}).cells
    finish(store, known, 4.0)
    (tmp_path / known.scale / known.task / "lmbda=0_beta=0_seed=0-00000000").mkdir()
    grid = build_grid(grid={"seed": [0]})
    assert seconds(estimator(grid, store), grid.cells[0]) == pytest.approx(4.0)


def test_cells_on_two_devices_are_not_mixed(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"seed": [0, 1, 2, 3]}), Store(tmp_path)
    for cell, took, device in zip(grid.cells, (4.0, 4.0, 400.0), ("cuda", "cuda", "cpu"), strict=False):
        finish(store, cell, took, device=device)
    found = estimator(grid, store)
    assert seconds(found, grid.cells[3]) == pytest.approx(4.0)
    assert found.describe_source() == "2 finished cells of the same kind (cuda)"


def plan(grid: Grid, store: Store) -> tuple[Overview, str]:
    found = build_overview(grid, store, "off")
    return found, "\n".join(render_summary(found))


def test_plan_says_what_its_times_rest_on(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"seed": [0, 1], "student": ["small", "base"]}), Store(tmp_path)
    small = [cell for cell in grid.cells if cell.labels["student"] == "small"]
    finish(store, small[0], 40.0)
    found, said = plan(grid, store)
    assert "time of 2 cells: as 1 finished cell of the same kind (cpu) took" in said
    assert "time of 2 cells: of one alone, from its FLOPs at 80 GFLOP/s" in said
    left = [view.seconds_left for view in found.cells]
    assert left[grid.cells.index(small[0])] == 0
    assert left[grid.cells.index(small[1])] == pytest.approx(40.0)


def test_a_loaded_models_time_is_known_once_it_was_built(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0]}), Store(tmp_path)
    (cell,) = grid.cells
    loaded = cell.training.start.model_copy(
        update={"model": ModelSpec(name="m", pretrained="nobody/none", revision="0" * 40)}
    )
    training = cell.training.model_copy(update={"start": loaded})
    unknown = TimeEstimator(store, grid.scale).estimate_cell(training, is_packed=False)
    assert (unknown.seconds, unknown.basis) == (None, "nothing")
    store.get_artifact(grid.scale, "start", loaded).finish(parameters=1000)
    known = TimeEstimator(store, grid.scale).estimate_cell(training, is_packed=False)
    assert known.seconds == estimate_training_flops(training, 1000) / NOMINAL_FLOPS_PER_SECOND  # type: ignore[operator]
