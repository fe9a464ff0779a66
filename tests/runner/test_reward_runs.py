"""Runs of cells with a reward: records, resuming, and invalid rewards."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gkd_lab import experiments
from gkd_lab.config import ConfigError
from gkd_lab.runner.checkpoint_callback import _encode_metric_sums, _restore_metric_sums
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store
from gkd_lab.training.metric_accumulator import MetricAccumulator

from .tiny_experiments import contents, interrupted_at, options, table_of, tiny_grid

GREEDY: dict[str, Any] = {"evaluations": [{"decoding": "greedy"}]}
GRID: dict[str, Any] = {
    "grid": {"method": ["gkd", "rlef"], "alpha": [0, 0.5, 1]},
    "reward": "rougeL",
    "beta": 0.9,
}


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_cells_differ_in_alpha_and_anchor_to_the_sft_student(task: str, tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, task, **GRID, **GREEDY)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    rows = [row for row in table_of(grid, outputs) if row["role"] == "cell"]
    assert [row["status"] for row in rows] == ["done"] * 4
    for cell in grid.cells:
        history = Store(outputs).get_record(cell).read_history()
        alpha = cell.labels["alpha"] if cell.labels["method"] == "gkd" else 0.05
        assert all(("reward" in row) == ("advantage_std" in row) == (alpha < 1) for row in history)
        assert all(("loss/reward" in row) == (0 < alpha < 1) for row in history)
    of_rlef = [c for c in grid.cells if c.labels["method"] == "rlef"]
    first = [Store(outputs).get_record(cell).read_history()[0]["loss/divergence"] for cell in of_rlef]
    of_gkd = [c for c in grid.cells if c.labels == {**of_rlef[0].labels, "method": "gkd", "alpha": 0.5}]
    beside = Store(outputs).get_record(of_gkd[0]).read_history()[0]["loss/divergence"]
    assert 0 <= max(first) < 1e-3 * beside  # the student has hardly moved from its start


def test_interrupted_run_resumes_to_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_contents = []
    for name in ("straight", "cut"):
        grid = tiny_grid(tmp_path / name, "arithmetic", **GRID | {"grid": {"alpha": [0.5, 1]}}, **GREEDY)
        outputs = tmp_path / name / "outputs"
        if name == "cut":
            with interrupted_at(3, monkeypatch):
                run_grid(grid, options(outputs))
        assert run_grid(grid, options(outputs)).failures == []
        all_contents.append(contents(outputs))
    assert Store(outputs).get_record(grid.cells[0]).read_provenance()["resumed_at_step"] == 2
    assert all_contents[0] == all_contents[1]


def test_stored_averages_are_restored_by_a_pack_with_fewer_rewards() -> None:
    before = MetricAccumulator(2, [["divergence", "reward"], ["reward", "reward_2", "divergence"]])
    before.add_reward(0, "reward", 0.5, 0.25)
    before.add_reward(1, "reward_2", 0.75, 0.5)
    before.add_term_losses(torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]))
    before.n_batches = 1
    alone = MetricAccumulator(1, [["divergence", "reward"]])
    _restore_metric_sums(alone, 0, _encode_metric_sums(before, 0))
    (row,) = alone.pop_means()
    assert (row["reward"], row["advantage_std"]) == (0.5, 0.25)
    assert (row["loss/divergence"], row["loss/reward"]) == (1, 2)


REWARD_MODULE = "def short(prompts, texts, references):\n    return [{value} for text in texts]\n"


@pytest.fixture
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a module in the current folder, with a unique name."""
    file = tmp_path / f"own_{tmp_path.name.replace('-', '_')}.py"
    file.write_text(REWARD_MODULE.format(value="-float(len(text))"))
    monkeypatch.chdir(tmp_path)
    return file


def test_nan_reward_fails_only_its_cells(reward_module: Path, tmp_path: Path) -> None:
    reward_module.write_text(REWARD_MODULE.format(value="float('nan')"))
    changes = {"grid": {"alpha": [0.5, 1]}, "reward": f"{reward_module.stem}:short"}
    grid = tiny_grid(tmp_path, "arithmetic", **changes, **GREEDY)
    outputs = tmp_path / "outputs"
    assert len(run_grid(grid, options(outputs)).failures) == 1
    rewarded, plain = (Store(outputs).get_record(cell).read_status() for cell in grid.cells)
    assert plain["state"] == "done"
    assert f"'{reward_module.stem}:short' gave nan" in rewarded["error"]
    assert "row 0 of 4" in rewarded["error"]
    assert "at step 1" in rewarded["error"]


def test_missing_reward_function_is_refused_before_the_run(reward_module: Path, tmp_path: Path) -> None:
    grid = tiny_grid(
        tmp_path, "arithmetic", reward=f"{reward_module.stem}:shorter", alpha=0.5, grid={}, **GREEDY
    )
    with pytest.raises(ConfigError, match=f"{reward_module.stem} .*'shorter'.*'short'"):
        experiments.check_generators_and_rewards(grid)


@pytest.mark.slow
def test_command_line_finds_a_reward_beside_the_experiment(reward_module: Path, tmp_path: Path) -> None:
    """An invalid reward is an error of one line."""
    tiny_grid(
        tmp_path, "arithmetic", reward=f"{reward_module.stem}:short", alpha=0.5, grid={}, steps=2, **GREEDY
    )
    words = [sys.executable, "-P", "-m", "gkd_lab", "run", "tiny.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run(
        [*words, "--set", f"reward={reward_module.stem}:shrt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert re.search(f"{reward_module.stem} .*'shrt'.*'short'", wrong.stderr)
    assert len(wrong.stderr.strip().splitlines()) == 1
