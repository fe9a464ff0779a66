"""Runs with a teacher behind a server: equal losses, and a server that goes down during a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import Grid
from gkd_lab.runner import artifacts
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store

from ..teachers.teacher_server import Served, serving
from .tiny_experiments import contents, options, table_of, tiny_grid

GREEDY: dict[str, Any] = {"evaluations": [{"decoding": "greedy"}]}


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


@pytest.fixture(scope="module")
def cached_teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float]]:
    """A teacher, and the losses of a cell that trains on its cached top-20 scores."""
    folder = tmp_path_factory.mktemp("kept")
    changes = {"teacher_scores": {"top_k": 20}, "lmbda": 0, "grid": {"beta": [0.5]}}
    grid, outputs = tiny_grid(folder, "arithmetic", **changes, **GREEDY), folder / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    teacher = grid.cells[0].training.teacher
    record = Store(outputs).get_artifact(grid.scale, "teacher", teacher)
    return artifacts.load_artifact(record, teacher).model, read_losses(grid, outputs)[0]


@pytest.fixture
def served(cached_teacher: tuple[Any, list[float]]) -> Iterator[Served]:
    with serving(Served(cached_teacher[0])) as served_teacher:
        yield served_teacher


def read_losses(grid: Grid, outputs: Path) -> list[list[float]]:
    """Return the logged losses of each cell, in the grid's order."""
    return [[row["loss"] for row in Store(outputs).get_record(cell).read_history()] for cell in grid.cells]


def build_served_grid(served: Served, folder: Path, **changes: Any) -> Grid:
    teacher = {"server": served.address, "model": "large", "top_k": 20, "patience": 0.3}
    return tiny_grid(folder, "arithmetic", teacher=teacher, **{"grid": {"beta": [0.5]}, **GREEDY, **changes})


def test_served_scores_train_as_cached_scores_do(
    served: Served, cached_teacher: tuple[Any, list[float]], tmp_path: Path
) -> None:
    grid, outputs = build_served_grid(served, tmp_path, lmbda=0), tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    assert read_losses(grid, outputs)[0] == pytest.approx(cached_teacher[1], rel=1e-3)
    assert [row["role"] for row in table_of(grid, outputs)] == ["start", "cell"]
    assert not list(outputs.glob("nano/*/teacher-*"))


def test_on_policy_pack_is_scored_by_the_server(served: Served, tmp_path: Path) -> None:
    axes = {"lmbda": [0, 0.5, 1], "seed": [0, 1]}
    grid, outputs = build_served_grid(served, tmp_path, grid=axes, beta=0.5), tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    assert [row["status"] for row in table_of(grid, outputs) if row["role"] == "cell"] == ["done"] * 6
    for cell in grid.cells:
        on_policy_shares = {row["on_policy"] for row in Store(outputs).get_record(cell).read_history()}
        assert cell.lmbda not in (0, 1) or on_policy_shares == {cell.lmbda}


def test_unavailable_server_fails_the_cell_which_resumes_later(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_LAB_TEACHER_KEY", "of-this-test-alone")
    grid = build_served_grid(served, tmp_path, grid={"beta": [0, 0.5]}, lmbda=0.5)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_grid(grid, options(whole)).failures == []
    needed_requests = len(served.asked)
    served.down_after = needed_requests + needed_requests - 1  # the last step of the second run
    (line,) = run_grid(grid, options(parts)).failures  # one cause of both cells
    assert line.startswith("2 cells: ")
    assert "ServerUnavailable" in line and "status 503" in line and "--retry-failed" in line
    for cell in grid.cells:
        assert Store(parts).get_record(cell).read_state() == "failed"
        assert [path.name for path in Store(parts).get_record(cell).steps_folder.iterdir()] == [
            "checkpoint-2"
        ]
    served.down_after = None
    assert run_grid(grid, options(parts, retry_failed=True)).failures == []
    assert contents(whole) == contents(parts)
    assert not any(b"of-this-test-alone" in path.read_bytes() for path in parts.rglob("*") if path.is_file())
