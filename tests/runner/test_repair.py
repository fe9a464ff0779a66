"""Damaged files of finished and unfinished records are found and quarantined."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.repair import find_damaged_file, quarantine_damaged_result, repair_unfinished_training
from gkd_lab.store import DamagedRecord, Record
from gkd_lab.training.checkpoints import (
    build_checkpoint_path,
    list_complete_steps,
    quarantine_damaged_checkpoints,
    remove_other_checkpoints,
    write_checksums,
)

from .tiny_experiments import options, tiny_grid


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Finished record with a model of two files and a teacher text."""
    record = Record(tmp_path / "outputs" / "record")
    record.checkpoint.mkdir(parents=True)
    (record.checkpoint / "model.safetensors").write_bytes(b"weights")
    (record.checkpoint / "config.json").write_text("{}")
    (record.folder / "texts.jsonl").write_text('{"ids": [1]}\n')
    record.finish()
    return record


@pytest.mark.parametrize("name", ("checkpoint/model.safetensors", "checkpoint/config.json", "texts.jsonl"))
def test_damaged_file_of_a_finished_record_is_quarantined(name: str, record: Record, tmp_path: Path) -> None:
    output = io.StringIO()
    run_options = options(tmp_path / "outputs", Reporter(Console(file=output, width=500)))
    quarantine_damaged_result(record, run_options)
    assert (record.read_status()["state"], output.getvalue()) == ("done", "")
    flip_bit(record.folder / name)
    assert find_damaged_file(record) == record.folder / name
    quarantine_damaged_result(record, run_options)
    assert record.read_status() == {}
    quarantined_path = record.folder / f"{name.partition('/')[0]}.damaged"
    assert quarantined_path.exists()
    assert not (record.folder / name).exists()
    (line,) = output.getvalue().splitlines()
    assert line.startswith(f"{record.folder / name} ") and f" {quarantined_path};" in line


def test_missing_file_is_damage_and_added_file_is_not(record: Record) -> None:
    (record.checkpoint / "added.txt").write_text("a user's note")
    assert find_damaged_file(record) is None
    (record.checkpoint / "config.json").unlink()
    assert find_damaged_file(record) == record.checkpoint / "config.json"


def write_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint = build_checkpoint_path(str(folder), step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        (checkpoint / "trainer_state.json").write_text("{}")
        write_checksums(checkpoint)


@pytest.mark.parametrize("name", ("model.safetensors", "trainer_state.json", "sha256.json"))
def test_damaged_checkpoint_is_quarantined(name: str, tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 2, 4)
    assert list_complete_steps(tmp_path) == {2, 4}
    flip_bit(build_checkpoint_path(str(tmp_path), 4) / name)
    assert list_complete_steps(tmp_path) == {2}
    assert quarantine_damaged_checkpoints(tmp_path) == [tmp_path / "damaged-checkpoint-4"]
    remove_other_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "damaged-checkpoint-4"]


def test_training_with_an_incomplete_history_starts_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    write_checkpoints(record.steps_folder, 5)
    for step in (2, 4):
        record.log_row({"step": step, "loss": 1.0})
    repair_unfinished_training(record, options(tmp_path))
    assert list_complete_steps(record.steps_folder) == {5}, "the row of step 6 is not due yet"
    lines = record.metrics_file.read_text().splitlines()
    record.metrics_file.write_text(f"{lines[0][:-1]}\n{lines[1]}\n")
    repair_unfinished_training(record, options(tmp_path))
    assert list_complete_steps(record.steps_folder) == set()
    assert record.read_history() == []
    assert (record.folder / "metrics.jsonl.damaged").exists()


def test_damaged_spec_is_rewritten_and_another_runs_spec_stays(tmp_path: Path) -> None:
    first, second, *_ = tiny_grid(tmp_path, "arithmetic").cells
    record = Record(tmp_path / "record")
    record.write_spec(first.training)
    path = record.folder / "spec.json"
    original_spec = path.read_text()
    for old, new in (('"steps": 4', '"steps": 5'), (first.fingerprint, "0" * 8), ('"steps"', '"stept"')):
        assert old in original_spec
        path.write_text(original_spec.replace(old, new))
        record.write_spec(first.training)
        assert path.read_text() == original_spec
        assert (record.folder / "spec.json.damaged").read_text() != original_spec
    path.write_text(json.dumps({**json.loads(original_spec), "format": 0}))
    record.write_spec(first.training)
    assert json.loads(path.read_text())["format"] == 0, "specs of older formats stay"
    path.write_text(original_spec)
    with pytest.raises(DamagedRecord):
        record.write_spec(second.training)
