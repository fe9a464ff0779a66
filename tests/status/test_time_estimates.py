"""Time estimates: from finished cells of the same kind, else from FLOPs."""

import re
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import Cell, Grid
from gkd_lab.config.artifact_specs import ModelSpec
from gkd_lab.config.checkpoint_files import CheckpointFiles
from gkd_lab.config.cost import (
    IMPORT_SECONDS,
    NOMINAL_FLOPS_PER_SECOND,
    estimate_training_flops,
    get_device_rate,
)
from gkd_lab.status.overview import Overview, build_overview
from gkd_lab.status.render import format_estimate, render_summary, render_time_left
from gkd_lab.status.time_estimates import TimeEstimator, create_estimator
from gkd_lab.store import Store
from gkd_lab.store.machine import write_import_seconds

from ..tables.synthetic_store import build_grid
from ..training.scripts import llama, saved


def write_finished_cell(
    store: Store, cell: Cell, seconds: float, shared_by: int = 1, device: str = "cpu"
) -> None:
    record = store.get_record(cell)
    record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    record.finish(steps=cell.training.steps, seconds=seconds, shared_by=shared_by, device=device)


def build_estimator(grid: Grid, store: Store) -> TimeEstimator:
    return create_estimator(
        ((cell, store.get_record(cell).read_status()) for cell in grid.cells), store, grid.scale
    )


def estimate_seconds(estimator: TimeEstimator, cell: Cell, *, packed: bool = False) -> float:
    estimate = estimator.estimate_cell(cell.training, is_packed=packed)
    assert estimate.seconds is not None
    return estimate.seconds


def test_without_finished_cells_flops_are_taken_at_the_nominal_rate(tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0]})
    (cell,) = grid.cells
    estimator = build_estimator(grid, Store(tmp_path))
    flops = estimate_training_flops(cell.training)
    assert flops is not None
    assert estimate_seconds(estimator, cell) == flops / NOMINAL_FLOPS_PER_SECOND
    assert estimator.estimate_cell(cell.training, is_packed=False).basis == "FLOPs"
    assert estimator.describe_source() is None


def test_the_time_of_a_finished_cell_is_scaled_by_steps_and_share_of_sampling(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 1], "steps": [10, 30]}), Store(tmp_path)
    short, *_ = grid.cells
    assert (short.lmbda, short.training.steps) == (0, 10)
    write_finished_cell(store, short, 4.0)
    estimator = build_estimator(grid, store)
    for cell in grid.cells:
        share = estimate_training_flops(cell.training) / estimate_training_flops(short.training)  # type: ignore[operator]
        assert estimate_seconds(estimator, cell) == pytest.approx(4 * share)
        assert share >= cell.training.steps / 10
    assert re.fullmatch(r"1 finished cell .*\(cpu\)", estimator.describe_source())


def test_times_of_packed_cells_are_used_for_packed_cells_only(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"beta": [0, 0.5, 1]}), Store(tmp_path)
    for cell in grid.cells[:2]:
        write_finished_cell(store, cell, 6.0, shared_by=3)
    estimator = build_estimator(grid, store)
    assert estimate_seconds(estimator, grid.cells[2], packed=True) == pytest.approx(2.0)
    assert estimator.estimate_cell(grid.cells[2].training, is_packed=True).basis == "finished cells"
    assert estimator.estimate_cell(grid.cells[2].training, is_packed=False).basis == "FLOPs"


@pytest.mark.parametrize("changes", [{"student": "base"}, {"precision": "bf16"}, {"max_output_tokens": 16}])
def test_cells_of_another_kind_are_not_used(changes: dict[str, Any], tmp_path: Path) -> None:
    store, (finished_cell,) = Store(tmp_path), build_grid(grid={"lmbda": [0]}).cells
    write_finished_cell(store, finished_cell, 4.0)
    grid = build_grid(grid={"lmbda": [0]}, **changes)
    estimate = build_estimator(grid, store).estimate_cell(grid.cells[0].training, is_packed=False)
    assert estimate.basis == "FLOPs"


def test_cells_of_another_experiment_of_the_same_kind_are_used(tmp_path: Path) -> None:
    store, (finished_cell,) = Store(tmp_path), build_grid(grid={"seed": [7]}).cells
    write_finished_cell(store, finished_cell, 4.0)
    (tmp_path / finished_cell.scale / finished_cell.task / "lmbda=0_beta=0_seed=0-00000000").mkdir()
    grid = build_grid(grid={"seed": [0]})
    assert estimate_seconds(build_estimator(grid, store), grid.cells[0]) == pytest.approx(4.0)


def test_cells_on_two_devices_are_not_mixed(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"seed": [0, 1, 2, 3]}), Store(tmp_path)
    for cell, took, device in zip(grid.cells, (4.0, 4.0, 400.0), ("cuda", "cuda", "cpu"), strict=False):
        write_finished_cell(store, cell, took, device=device)
    estimator = build_estimator(grid, store)
    assert estimate_seconds(estimator, grid.cells[3]) == pytest.approx(4.0)
    assert re.fullmatch(r"2 finished cells .*\(cuda\)", estimator.describe_source())


def summarize_plan(grid: Grid, store: Store) -> tuple[Overview, str]:
    overview = build_overview(grid, store, "off")
    return overview, "\n".join(render_summary(overview))


def test_the_plan_names_the_bases_of_its_estimates(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"seed": [0, 1], "student": ["small", "base"]}), Store(tmp_path)
    small = [cell for cell in grid.cells if cell.labels["student"] == "small"]
    write_finished_cell(store, small[0], 40.0)
    overview, text = summarize_plan(grid, store)
    assert re.search(r"time of 2 cells: .*1 finished cell .*\(cpu\)", text)
    assert re.search("time of 2 cells: .*80 GFLOP/s", text)
    seconds_left = [view.seconds_left for view in overview.cells]
    trained = overview.cells[grid.cells.index(small[0])]
    assert trained.seconds_left == trained.decoding_seconds > 0
    assert seconds_left[grid.cells.index(small[1])] == pytest.approx(40.0)


def test_the_time_of_a_loaded_model_is_estimated_once_its_size_is_recorded(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0]}), Store(tmp_path)
    (cell,) = grid.cells
    loaded = cell.training.start.model_copy(
        update={"model": ModelSpec(name="m", pretrained="nobody/none", revision="0" * 40)}
    )
    training = cell.training.model_copy(update={"start": loaded})
    missing_estimate = TimeEstimator(store, grid.scale).estimate_cell(training, is_packed=False)
    assert (missing_estimate.seconds, missing_estimate.basis) == (None, "nothing")
    store.get_artifact(grid.scale, "start", loaded).finish(parameters=1000)
    built_estimate = TimeEstimator(store, grid.scale).estimate_cell(training, is_packed=False)
    assert built_estimate.seconds == estimate_training_flops(training, 1000) / NOMINAL_FLOPS_PER_SECOND  # type: ignore[operator]


def finish_evaluation(store: Store, cell: Cell, rows: int, seconds: float) -> None:
    record = store.get_record(cell).get_evaluation(cell.evaluations[0])
    scores = {"accuracy": {"value": 1.0}}
    record.write_results(cell.evaluations[0], [], scores, rows=rows, seconds_of_decoding=seconds)


def test_decoding_is_counted_as_finished_evaluations_of_the_grid_took(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 1]}), Store(tmp_path)
    first, second = build_overview(grid, store, "auto").cells
    assert first.decoding_seconds == second.decoding_seconds > 0, "by FLOPs: 50 rows of 8 + 8 tokens"
    write_finished_cell(store, first.cell, 40.0)
    finish_evaluation(store, first.cell, rows=25, seconds=10.0)
    overview = build_overview(grid, store, "auto")
    assert [view.decoding_seconds for view in overview.cells] == [0.0, 20.0], "50 rows at 0.4 s each"
    assert overview.cells[0].seconds_left == 0
    assert overview.decoding_bases == {"finished cells": 2, "FLOPs": 1}, "cell, start; teacher"
    text = "\n".join(render_summary(overview))
    assert "decoding of 2 evaluations: as finished ones took" in text
    assert "decoding of 1 evaluation: from FLOPs at 80 GFLOP/s" in text


def test_the_time_left_includes_loading_the_libraries_as_long_as_it_took_here(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0]}), Store(tmp_path)
    before = build_overview(grid, store, "auto")
    write_import_seconds(tmp_path, 33.0)
    after = build_overview(grid, store, "auto")
    assert (before.import_seconds, after.import_seconds) == (IMPORT_SECONDS, 33.0)
    assert after.seconds_left == pytest.approx((before.seconds_left or 0) + 33.0 - IMPORT_SECONDS)
    assert "33 s of imports included" in render_time_left(after)


def test_at_other_scales_an_estimate_is_in_gpu_time_and_names_its_device() -> None:
    rate = get_device_rate("paper")
    assert rate == get_device_rate("smol") != get_device_rate("nano") and rate.is_gpu
    assert "A100" in rate.name and "assumed, not measured" in rate.name
    estimates = {
        hours: format_estimate(3600.0 * hours, "FLOPs", rate) for hours in (0.001, 0.5, 3.14159, 47, 480)
    }
    assert estimates == {
        0.001: "under 1 GPU-min",
        0.5: "30 GPU-min",
        3.14159: "3.14 GPU-h",
        47: "47 GPU-h",
        480: "20 GPU-days",
    }
    assert format_estimate(7200.0, "finished cells", rate) == "2.0 h", (
        "measured times are those of the machine"
    )


def test_a_model_in_a_folder_has_its_size_from_the_headers_of_its_weights(tmp_path: Path) -> None:
    model = llama(1)
    saved(model, tmp_path / "mine")
    assert CheckpointFiles(tmp_path / "mine").parameter_count == sum(p.numel() for p in model.parameters())
    (tmp_path / "mine/model.safetensors").write_bytes(b"cut")
    assert CheckpointFiles(tmp_path / "mine").parameter_count is None
