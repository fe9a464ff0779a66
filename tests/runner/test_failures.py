"""After each fault the same command ends what is left, and every record is what it is without the fault."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .fault_script import SMALL
from .tiny_experiments import contents, table_of, tiny_grid

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow

ENDED = {
    "SIGTERM in SFT": 143,
    "SIGTERM in training": 143,
    "Ctrl-C in training": 130,
    "Ctrl-C twice": 130,
    "SIGTERM in evaluation": 143,
    "SIGKILL in a checkpoint": -9,
    "SIGKILL in status.json": -9,
    "taken over": 3,
    "disk full": 3,
    "flipped checkpoint": 143,
    "cut checkpoint": 143,
    "cut metrics": 143,
    "flipped spec": 143,
    "flipped student": 143,
    "cut status": 0,
    "twice at once": 0,
}
"""Fault -> how the first process ended; 3 stands for an error of the machine."""

SAID = {
    "flipped checkpoint": "damaged-checkpoint-3: not as it was written, set aside",
    "cut checkpoint": "damaged-checkpoint-3: not as it was written, set aside",
    "cut metrics": "metrics.jsonl ends at step 0 of 3, set aside",
    "flipped student": "model.safetensors is not as it was written, set aside",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which every fault was met once."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, str(HERE / "fault_script.py"), str(HERE / "tiny_experiments.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        assert done.returncode == 0, done.stderr[-3000:]
        yield folder
    finally:
        if os.path.ismount(folder / "disk-full"):
            subprocess.run(["umount", str(folder / "disk-full")], check=True)


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((root / "found.json").read_text())
    return read


def results(outputs: Path) -> dict[str, bytes]:
    """What two equal runs share, without what was set aside."""
    return {name: content for name, content in contents(outputs).items() if ".damaged" not in name}


@pytest.mark.parametrize("fault", ENDED)
def test_after_a_fault_the_same_command_ends_as_if_nothing_had_happened(
    fault: str, root: Path, found: dict[str, Any]
) -> None:
    if fault == "disk full" and not os.path.ismount(root / "disk-full"):
        pytest.skip("a small file system can be mounted by root only")
    assert (found[fault]["status"], found[fault]["again"]) == (ENDED[fault], 0)
    assert SAID.get(fault, "") in found[fault]["said"]
    outputs = root / fault.replace(" ", "-")
    grid = tiny_grid(root, "arithmetic", **SMALL)
    assert {row["status"] for row in table_of(grid, outputs)} == {"done"}
    assert table_of(grid, outputs) == table_of(grid, root / "undisturbed")
    expected, now = results(root / "undisturbed"), results(outputs)
    differing = {name for name in expected.keys() | now.keys() if expected.get(name) != now.get(name)}
    # The Trainer's own mean of a window that was cut in two is of its second part.
    cut_window = {name for name in differing if "/teacher-" in name and name.endswith("metrics.jsonl")}
    # Trained once more without its pack, a cell is what it was up to rounding.
    alone = {name for name in differing if "/lmbda=0.5" in name}
    excused = {"SIGTERM in SFT": cut_window, "cut status": alone}
    assert differing - excused.get(fault, set()) == set()


@pytest.mark.parametrize("fault", ("SIGTERM in training", "Ctrl-C in training"))
def test_a_signal_ends_a_training_after_its_step_with_a_checkpoint(fault: str, found: dict[str, Any]) -> None:
    saved = [name for name in found[fault]["left"] if name.endswith("checkpoint-3/sha256.json")]
    assert len(saved) == 2


def test_a_second_ctrl_c_does_not_wait_for_the_step(found: dict[str, Any]) -> None:
    assert not any("checkpoint-3" in name for name in found["Ctrl-C twice"]["left"])


def test_no_cell_runs_twice_when_the_same_command_does(root: Path) -> None:
    histories = sorted((root / "twice-at-once").rglob("times.jsonl"))
    assert len(histories) == 4
    for path in histories:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert sum("began" in row for row in rows) == 1, path
