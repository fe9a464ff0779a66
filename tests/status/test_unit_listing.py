"""Units in `plan` and `status`: what they ask for, where they run, and what the engine says of their jobs."""

from collections.abc import Collection
from pathlib import Path

import pytest

from gkd_lab.config.units import plan_units
from gkd_lab.runner.engines import queues
from gkd_lab.status.time_estimates import TimeEstimator
from gkd_lab.status.unit_listing import list_planned_units, list_run_units
from gkd_lab.status.unit_resources import estimate_resources
from gkd_lab.store import Store
from gkd_lab.store.unit_files import UnitFiles, UnitJob

from ..config.test_units import load_grid


def test_planned_units_show_needs_memory_and_time(tmp_path: Path) -> None:
    grid, store = load_grid(tmp_path), Store(tmp_path / "outputs")
    listing, margins = list_planned_units(grid, store, 3)
    teacher, start, *packs = listing.rows
    assert [row[1] for row in (teacher, packs[0])] == ["arithmetic: teacher", "arithmetic: pack of 3 cells"]
    assert packs[0][3] == f"{teacher[0]},{start[0]}"
    assert all(row[4].endswith("MiB") and row[5].endswith("min") for row in listing.rows)
    assert margins.startswith("on a cluster: 5 units; memory of 0 as measured")


def test_measured_memory_replaces_the_estimate_of_units_that_are_no_larger(tmp_path: Path) -> None:
    grid, store = load_grid(tmp_path), Store(tmp_path / "outputs")
    units = plan_units(grid.cells, 3)
    files = UnitFiles.locate(store.root, grid.fingerprint)
    small = units[-1]
    assert len(small.cells) == 2
    files.log_run(small.id, event="start")
    files.log_run(small.id, event="end", status=0, seconds=9, peak_bytes=4 * 2**30)
    resources = estimate_resources(units, files, TimeEstimator(store, "nano"))
    assert resources[small.id].memory_bytes == 5 * 2**30, "a quarter more than was measured"
    assert [resources[unit.id].is_measured for unit in units] == [False, False, False, False, True]
    files.log_run(units[2].id, event="start")
    files.log_run(units[2].id, event="end", status=0, seconds=9, peak_bytes=2 * 2**30)
    resources = estimate_resources(units, files, TimeEstimator(store, "nano"))
    assert resources[small.id].memory_bytes == resources[units[3].id].memory_bytes == 2.5 * 2**30


def test_larger_packs_ask_for_more(tmp_path: Path) -> None:
    grid = load_grid(tmp_path, student={"layers": 4, "width": 512, "heads": 8, "sft": {"steps": 4}})
    files, estimator = UnitFiles(tmp_path / "none"), TimeEstimator(Store(tmp_path), "nano")
    small, large = (
        estimate_resources(units, files, estimator)[units[-1].id]
        for units in (plan_units(grid.cells, 1), plan_units(grid.cells, 8))
    )
    assert small.memory_bytes is not None and large.memory_bytes is not None
    assert small.seconds is not None and large.seconds is not None
    assert small.memory_bytes < large.memory_bytes and small.seconds < large.seconds


def test_units_that_were_submitted_show_queue_place_requeues_and_log(tmp_path: Path) -> None:
    grid, store = load_grid(tmp_path), Store(tmp_path / "outputs")

    def read_queue(jobs: Collection[UnitJob]) -> dict[str, str]:
        assert {job.job for job in jobs} == {"7_1", "8_0"}
        return {"7_1": "RUNNING"}

    assert list_run_units(grid, store, read_queue) is None
    teacher, start, *packs = plan_units(grid.cells, 3)
    files = UnitFiles.locate(store.root, grid.fingerprint)
    ended = UnitJob(teacher.id, "slurm", "7_0", "a.log")
    files.log_jobs(
        [ended, UnitJob(start.id, "slurm", "7_1", "b.log"), UnitJob(packs[0].id, "slurm", "8_0", "")]
    )
    files.log_end(ended, "TIMEOUT")
    files.write_pack_limit(3)
    for _ in range(3):
        files.log_run(start.id, event="start", host="n2", device="1")
    listing = list_run_units(grid, store, read_queue)
    assert listing is not None
    rows = {row[0]: dict(zip(listing.columns[2:], row[2:], strict=True)) for row in listing.rows}
    assert rows[teacher.id]["queue"] == "TIMEOUT"
    assert list(rows[start.id].values()) == ["missing", "RUNNING", "7_1", "n2", "1", "2", "b.log"]
    assert rows[packs[0].id]["queue"] == "gone"
    assert rows[packs[1].id]["queue"] == ""


def test_jobs_on_ray_are_unknown_where_ray_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, or without its cluster."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.2:1")
    monkeypatch.setattr(queues, "ANSWER_SECONDS", 5)
    jobs = [UnitJob("0123456789ab", "ray", "ray-01", "a.log")]
    assert queues.describe_queues(jobs, "none") == {"ray-01": "unknown"}
    assert queues.describe_queues([], "none") == {}
