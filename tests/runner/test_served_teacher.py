"""Cells whose teacher is behind a server: what they learn, and a server that goes down in mid-run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import Grid
from gkd_lab.runner import artifacts
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store

from ..teachers.teacher_server import Served, serving
from .tiny_experiments import contents, options, table_of, tiny_grid

GREEDY: dict[str, Any] = {"evaluations": [{"decoding": "greedy"}]}


@pytest.fixture(scope="module", autouse=True)
def silence() -> None:
    silence_libraries()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float]]:
    """A teacher, and the losses of a cell that learns from the 20 tokens that were kept of it."""
    folder = tmp_path_factory.mktemp("kept")
    asked = {"teacher_scores": {"top_k": 20}, "lmbda": 0, "grid": {"beta": [0.5]}}
    grid, outputs = tiny_grid(folder, "arithmetic", **asked, **GREEDY), folder / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    teacher = grid.cells[0].training.teacher
    record = Store(outputs).get_artifact(grid.scale, "teacher", teacher)
    return artifacts.load_artifact(record, teacher).model, losses(grid, outputs)[0]


@pytest.fixture
def served(kept: tuple[Any, list[float]]) -> Iterator[Served]:
    with serving(Served(kept[0])) as found:
        yield found


def losses(grid: Grid, outputs: Path) -> list[list[float]]:
    """Of each cell, in the grid's order."""
    return [[row["loss"] for row in Store(outputs).get_record(one).read_history()] for one in grid.cells]


def asked_of(served: Served, folder: Path, **changes: Any) -> Grid:
    teacher = {"server": served.address, "model": "large", "top_k": 20, "patience": 0.3}
    return tiny_grid(folder, "arithmetic", teacher=teacher, **{"grid": {"beta": [0.5]}, **GREEDY, **changes})


def test_a_server_s_scores_teach_what_kept_ones_teach(
    served: Served, kept: tuple[Any, list[float]], tmp_path: Path
) -> None:
    grid, outputs = asked_of(served, tmp_path, lmbda=0), tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    assert losses(grid, outputs)[0] == pytest.approx(kept[1], rel=1e-3)
    assert [row["role"] for row in table_of(grid, outputs)] == ["start", "cell"]
    assert not list(outputs.glob("nano/*/teacher-*"))


def test_a_pack_of_on_policy_cells_is_scored_as_it_writes(served: Served, tmp_path: Path) -> None:
    axes = {"lmbda": [0, 0.5, 1], "seed": [0, 1]}
    grid, outputs = asked_of(served, tmp_path, grid=axes, beta=0.5), tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    assert [row["status"] for row in table_of(grid, outputs) if row["role"] == "cell"] == ["done"] * 6
    for one in grid.cells:
        tossed = {row["on_policy"] for row in Store(outputs).get_record(one).read_history()}
        assert one.lmbda not in (0, 1) or tossed == {one.lmbda}


def test_a_server_that_goes_down_fails_the_cell_which_goes_on_where_it_was(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_LAB_TEACHER_KEY", "of-this-test-alone")
    grid = asked_of(served, tmp_path, grid={"beta": [0, 0.5]}, lmbda=0.5)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_grid(grid, options(whole)).failures == []
    needed = len(served.asked)
    served.down_after = needed + needed - 1  # the last step of the second run
    failed = run_grid(grid, options(parts)).failures
    assert len(failed) == 2
    assert all("ServerDown" in line and "status 503" in line and "--retry-failed" in line for line in failed)
    for one in grid.cells:
        assert [path.name for path in Store(parts).get_record(one).steps_folder.iterdir()] == ["checkpoint-2"]
    served.down_after = None
    assert run_grid(grid, options(parts, retry_failed=True)).failures == []
    assert contents(whole) == contents(parts)
    assert not any(b"of-this-test-alone" in path.read_bytes() for path in parts.rglob("*") if path.is_file())
