"""One process and two train alike: each step's loss, gradient, coin and text (gloo, on the CPU)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ranks.py")
CELLS = ("off", "on", "mixed sequences", "accumulated", "rewarded")


def start(folder: Path, rank: int, world: int, port: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(folder: Path, world: int) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(folder, rank, world, port) for rank in range(world)]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    results_of_worlds = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world}")
        results_of_worlds[world] = (folder, results(folder, world))
    return results_of_worlds


@pytest.mark.parametrize("cell", CELLS)
def test_pitfall_02_loss_and_gradient_are_those_of_one_process(runs: Any, cell: str) -> None:
    (alone_folder, (alone,)), (folder, two) = runs[1], runs[2]
    assert min(map(abs, alone[cell]["losses"])) > 1e-4
    # The Trainer adds up losses in float32 for its log.
    assert two[0][cell]["losses"] == pytest.approx(alone[cell]["losses"], rel=1e-6)
    assert two[0][cell]["norms"] == pytest.approx(alone[cell]["norms"], rel=1e-9)
    expected, actual = (load_file(f / f"{cell}.safetensors") for f in (alone_folder, folder))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_pitfall_10_all_ranks_toss_the_same_coin_and_log_the_same_figures(runs: Any, cell: str) -> None:
    alone, two = runs[1][1][0], runs[2][1]
    assert two[0][cell]["on_policy"] == two[1][cell]["on_policy"] == alone[cell]["on_policy"]
    for name in ("lengths", "truncated", "entropy", "reward", "advantage_std"):
        assert two[0][cell][name] == pytest.approx(alone[cell][name], rel=1e-6)


def test_pitfall_11_ranks_sample_different_text_that_one_process_would_have_sampled(runs: Any) -> None:
    alone = runs[1][1][0]["on"]["written"]
    first, second = (rank["on"]["written"] for rank in runs[2][1])
    assert first != second
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def test_resumed_within_an_epoch_ranks_go_on_with_the_rows_that_are_left(runs: Any) -> None:
    resumed_runs = [runs[world][1][0]["resumed"] for world in (1, 2)]
    for resumed_run in resumed_runs:
        assert len(resumed_run["straight"]) == 2
        assert resumed_run["again"] == resumed_run["straight"]
    assert resumed_runs[1]["straight"] == pytest.approx(resumed_runs[0]["straight"], rel=1e-6)


def test_a_pack_on_two_ranks_equals_a_pack_on_one(runs: Any) -> None:
    (alone_folder, (alone,)), (folder, two) = runs[1], runs[2]
    for n in (0, 1):
        assert len(alone["packed"]["losses"][n]) == 4
        assert two[0]["packed"]["losses"][n] == pytest.approx(alone["packed"]["losses"][n], rel=1e-6)
        for rank in two:
            assert rank["packed"]["weights"][n] == pytest.approx(alone["packed"]["weights"][n], rel=1e-9)
        place = Path(f"packed{n}") / "checkpoint-4" / "model.safetensors"
        expected, actual = (load_file(f / place) for f in (alone_folder, folder))
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("what", ("no loss", "no reward"))
def test_a_cell_that_fails_in_one_process_fails_in_all_and_its_neighbour_goes_on(
    runs: Any, what: str
) -> None:
    two = [rank[what] for rank in runs[2][1]]
    for rank in two:
        assert list(rank["failures"]) == ["0"]
        assert len(rank["losses"][0]) < 4
        assert rank["losses"][1] == two[0]["losses"][1] == runs[2][1][0]["packed"]["losses"][1]
        assert rank["weights"][1] == runs[2][1][0]["packed"]["weights"][1]
