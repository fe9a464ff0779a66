"""An experiment that is killed at any moment and run again gives equal bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .tiny_experiments import contents, table_of, tiny_grid

TESTS_FOLDER = Path(__file__).parent


LORA: dict[str, Any] = {
    "student": {"layers": 1, "width": 8, "heads": 2, "sft": {"steps": 4}, "lora": {"r": 2}},
    "grid": {"lmbda": [0, 0.5]},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "changes"),
    [("arithmetic", {}), ("translation", {}), ("arithmetic", LORA), ("translation", LORA)],
    ids=["arithmetic", "translation", "arithmetic with LoRA", "translation with LoRA"],
)
def test_killed_and_resumed_run_equals_an_undisturbed_one(
    task: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Killed in SFT, before the export of its model, in distillation, in evaluation, before four renames."""
    command = [
        sys.executable,
        str(TESTS_FOLDER / "killed_script.py"),
        str(TESTS_FOLDER / "tiny_experiments.py"),
        task,
        str(tmp_path),
        json.dumps(changes),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    grid = tiny_grid(tmp_path, task, **changes)
    expected = contents(tmp_path / "undisturbed")
    rows = table_of(grid, tmp_path / "undisturbed")
    assert {row["status"] for row in rows} == {"done"}
    moments = json.loads((tmp_path / "moments.json").read_text())
    assert len(moments) == 8
    for moment, folder in moments.items():
        actual = contents(Path(folder))
        assert actual.keys() == expected.keys(), moment
        differing = [name for name, content in expected.items() if actual[name] != content]
        assert not differing, moment
        assert table_of(grid, Path(folder)) == rows, moment
