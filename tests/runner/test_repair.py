"""Damage to what is finished or half done is found, set aside and said, without a training."""

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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Finished: a model of two files and a text."""
    found = Record(tmp_path / "outputs" / "record")
    found.checkpoint.mkdir(parents=True)
    (found.checkpoint / "model.safetensors").write_bytes(b"weights")
    (found.checkpoint / "config.json").write_text("{}")
    (found.folder / "texts.jsonl").write_text('{"ids": [1]}\n')
    found.finish()
    return found


@pytest.mark.parametrize("name", ("checkpoint/model.safetensors", "checkpoint/config.json", "texts.jsonl"))
def test_a_flipped_bit_of_a_finished_record_is_found_set_aside_and_to_be_made_again(
    name: str, record: Record, tmp_path: Path
) -> None:
    told = io.StringIO()
    asked = options(tmp_path / "outputs", Reporter(Console(file=told, width=500)))
    quarantine_damaged_result(record, asked)
    assert (record.read_status()["state"], told.getvalue()) == ("done", "")
    flip(record.folder / name)
    assert find_damaged_file(record) == record.folder / name
    quarantine_damaged_result(record, asked)
    assert record.read_status() == {}
    aside = record.folder / f"{name.partition('/')[0]}.damaged"
    assert aside.exists()
    assert not (record.folder / name).exists()
    said = f"{record.folder / name} is not as it was written, set aside: {aside}; it is made again\n"
    assert told.getvalue() == said


def test_a_file_that_is_gone_is_damage_too_and_one_that_was_never_noted_is_not(record: Record) -> None:
    (record.checkpoint / "added.txt").write_text("a user's note")
    assert find_damaged_file(record) is None
    (record.checkpoint / "config.json").unlink()
    assert find_damaged_file(record) == record.checkpoint / "config.json"


def sealed_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        place = build_checkpoint_path(str(folder), step)
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(b"weights")
        (place / "trainer_state.json").write_text("{}")
        write_checksums(place)


@pytest.mark.parametrize("name", ("model.safetensors", "trainer_state.json", "sha256.json"))
def test_a_changed_checkpoint_to_resume_from_is_set_aside(name: str, tmp_path: Path) -> None:
    sealed_steps(tmp_path, 2, 4)
    assert list_complete_steps(tmp_path) == {2, 4}
    flip(build_checkpoint_path(str(tmp_path), 4) / name)
    assert list_complete_steps(tmp_path) == {2}
    assert quarantine_damaged_checkpoints(tmp_path) == [tmp_path / "damaged-checkpoint-4"]
    remove_other_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "damaged-checkpoint-4"]


def test_without_a_whole_history_a_training_begins_anew(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    sealed_steps(record.steps_folder, 5)
    for step in (2, 4):
        record.log_row({"step": step, "loss": 1.0})
    repair_unfinished_training(record, options(tmp_path))
    assert list_complete_steps(record.steps_folder) == {5}, "the row of step 6 is still to come"
    lines = record.metrics_file.read_text().splitlines()
    record.metrics_file.write_text(f"{lines[0][:-1]}\n{lines[1]}\n")
    repair_unfinished_training(record, options(tmp_path))
    assert list_complete_steps(record.steps_folder) == set()
    assert record.read_history() == []
    assert (record.folder / "metrics.jsonl.damaged").exists()


def test_a_description_that_is_damaged_is_written_again_and_another_runs_is_left(tmp_path: Path) -> None:
    first, second, *_ = tiny_grid(tmp_path, "arithmetic").cells
    record = Record(tmp_path / "record")
    record.write_spec(first.training)
    path = record.folder / "spec.json"
    whole = path.read_text()
    for old, new in (('"steps": 4', '"steps": 5'), (first.fingerprint, "0" * 8), ('"steps"', '"stept"')):
        assert old in whole
        path.write_text(whole.replace(old, new))
        record.write_spec(first.training)
        assert path.read_text() == whole
        assert (record.folder / "spec.json.damaged").read_text() != whole
    path.write_text(json.dumps({**json.loads(whole), "format": 0}))
    record.write_spec(first.training)
    assert json.loads(path.read_text())["format"] == 0, "older formats are not judged by today's"
    path.write_text(whole)
    with pytest.raises(DamagedRecord):
        record.write_spec(second.training)
