"""Killed at any moment and run again, an experiment ends as if nothing had happened, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .tiny_experiments import contents, table_of, tiny_grid

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_killed_and_run_again_equals_undisturbed(task: str, tmp_path: Path) -> None:
    """In teacher SFT, in distillation, in evaluation, and before four renames spread over the run."""
    command = [
        sys.executable,
        str(HERE / "killed_script.py"),
        str(HERE / "tiny_experiments.py"),
        task,
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    grid = tiny_grid(tmp_path, task)
    expected = contents(tmp_path / "undisturbed")
    rows = table_of(grid, tmp_path / "undisturbed")
    assert {row["status"] for row in rows} == {"done"}
    moments = json.loads((tmp_path / "moments.json").read_text())
    assert len(moments) == 7
    for moment, place in moments.items():
        found = contents(Path(place))
        assert found.keys() == expected.keys(), moment
        differing = [name for name, content in expected.items() if found[name] != content]
        assert not differing, moment
        assert table_of(grid, Path(place)) == rows, moment
