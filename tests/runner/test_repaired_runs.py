"""Running again adds requested metrics and ignores truncated checkpoints."""

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


def test_added_metrics_are_computed_from_stored_predictions(tmp_path: Path) -> None:
    first_metrics = [{"decoding": "greedy", "metrics": ["accuracy"]}]
    more_metrics = [{"decoding": "greedy", "metrics": ["accuracy", "exact_match"]}]
    changes = {"grid": {"lmbda": [0, 1]}}
    outputs = tmp_path / "outputs"
    first_grid = tiny_grid(tmp_path, "arithmetic", evaluations=first_metrics, **changes)
    run_grid(first_grid, options(outputs))
    weights = {p: p.stat().st_mtime_ns for p in outputs.rglob("model.safetensors")}
    grid = tiny_grid(tmp_path, "arithmetic", evaluations=more_metrics, **changes)
    assert {row["status"] for row in table_of(grid, outputs)} == {"missing"}
    run_grid(grid, options(outputs))
    rows = table_of(grid, outputs)
    assert {row["status"] for row in rows} == {"done"}
    assert all(row["exact_match"] is not None and row["accuracy"] is not None for row in rows)
    assert {p: p.stat().st_mtime_ns for p in outputs.rglob("model.safetensors")} == weights
    cell = grid.cells[0]
    prediction_rows = (
        Store(outputs).get_record(cell).get_evaluation(cell.evaluations[0]).read_prediction_rows()
    )
    assert all(set(row["scores"]) == {"accuracy", "exact_match"} for row in prediction_rows)


def test_truncated_checkpoint_is_not_complete(tmp_path: Path) -> None:
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


def test_full_disk_fails_no_part_but_a_librarys_oserror_does(tmp_path: Path) -> None:
    record = Record(tmp_path / "part")
    with pytest.raises(OSError, match="No space"), record_failures([record], tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert record.read_status() == {}
    with pytest.raises(RecordedFailure), record_failures([record], tmp_path):
        raise OSError("no file named model.safetensors in the folder")
    assert record.read_status()["state"] == "failed"
    assert "model.safetensors" in record.read_status()["error"]
