"""What was damaged, or was asked for later, is mended by running again."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Record, Store
from gkd_lab.training.checkpoints import build_checkpoint_path, list_complete_steps

from .tiny_experiments import options, table_of, tiny_grid


def test_metrics_asked_for_later_are_computed_from_what_was_written(tmp_path: Path) -> None:
    asked = [{"decoding": "greedy", "metrics": ["accuracy"]}]
    later = [{"decoding": "greedy", "metrics": ["accuracy", "exact_match"]}]
    changes = {"grid": {"lmbda": [0, 1]}}
    outputs = tmp_path / "outputs"
    first = tiny_grid(tmp_path, "arithmetic", evaluations=asked, **changes)
    run_grid(first, options(outputs))
    weights = {p: p.stat().st_mtime_ns for p in outputs.rglob("model.safetensors")}
    grid = tiny_grid(tmp_path, "arithmetic", evaluations=later, **changes)
    assert {row["status"] for row in table_of(grid, outputs)} == {"missing"}
    run_grid(grid, options(outputs))
    rows = table_of(grid, outputs)
    assert {row["status"] for row in rows} == {"done"}
    assert all(row["exact_match"] is not None and row["accuracy"] is not None for row in rows)
    assert {p: p.stat().st_mtime_ns for p in outputs.rglob("model.safetensors")} == weights
    cell = grid.cells[0]
    written = Store(outputs).get_record(cell).get_evaluation(cell.evaluations[0]).read_prediction_rows()
    assert all(set(row["scores"]) == {"accuracy", "exact_match"} for row in written)


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        folder = build_checkpoint_path(str(tmp_path), step)
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        save_file({"weight": torch.zeros(64)}, folder / "model.safetensors")
    assert list_complete_steps(tmp_path) == {2, 4, 6}
    (build_checkpoint_path(str(tmp_path), 6) / "trainer_state.json").write_text("")
    weights = build_checkpoint_path(str(tmp_path), 4) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert list_complete_steps(tmp_path) == {2}


def test_a_full_disk_is_nobody_s_failure_and_a_library_s_oserror_is(tmp_path: Path) -> None:
    part = Record(tmp_path / "part")
    with pytest.raises(OSError, match="No space"), record_failures([part], tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert part.read_status() == {}
    with pytest.raises(RecordedFailure), record_failures([part], tmp_path):
        raise OSError("no file named model.safetensors in the folder")
    assert part.read_status()["state"] == "failed"
    assert "model.safetensors" in part.read_status()["error"]
