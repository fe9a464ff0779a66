"""The files of a finished training are hashed, and every later change is detected."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gkd_lab.store import Record
from gkd_lab.store.file_hashes import list_changed_files, read_file_hashes

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def record(tmp_path: Path) -> Record:
    record = Record(tmp_path)
    record.checkpoint.mkdir()
    (record.checkpoint / "model.safetensors").write_bytes(b"\x00" * 64)
    (record.checkpoint / "config.json").touch()
    record.write_provenance({"python": "3"})
    record.log_row({"step": 1})
    record.finish()
    return record


def test_files_of_a_finished_training_are_hashed(record: Record) -> None:
    hashes = read_file_hashes(record.folder)
    assert hashes is not None
    assert set(hashes) == {
        *("provenance.json", "metrics.jsonl"),
        *("checkpoint/model.safetensors", "checkpoint/config.json"),
    }
    assert hashes["checkpoint/config.json"] == EMPTY
    assert list_changed_files(record.folder) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


CHANGES: dict[str, Callable[[Record], object]] = {
    "model.safetensors has changed": lambda record: flip(record.checkpoint / "model.safetensors"),
    "config.json is missing": lambda record: (record.checkpoint / "config.json").unlink(),
    "adapter.bin was added later": lambda record: (record.checkpoint / "adapter.bin").touch(),
    "metrics.jsonl has changed": lambda record: record.log_row({"step": 2}),
}


@pytest.mark.parametrize(("expected", "change"), CHANGES.items(), ids=CHANGES.keys())
def test_changed_file_is_listed(expected: str, change: Callable[[Record], object], record: Record) -> None:
    change(record)
    (message,) = list_changed_files(record.folder)
    assert expected in message
