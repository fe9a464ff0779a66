"""What a training left is hashed when it is done, and every later change of it is seen."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gkd_lab.store import Record
from gkd_lab.store.file_hashes import list_changed_files, read_file_hashes

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path)
    made.checkpoint.mkdir()
    (made.checkpoint / "model.safetensors").write_bytes(b"\x00" * 64)
    (made.checkpoint / "config.json").touch()
    made.write_provenance({"python": "3"})
    made.log_row({"step": 1})
    made.finish()
    return made


def test_the_files_of_a_finished_training_are_hashed(record: Record) -> None:
    stored = read_file_hashes(record.folder)
    assert stored is not None
    assert set(stored) == {
        *("provenance.json", "metrics.jsonl"),
        *("checkpoint/model.safetensors", "checkpoint/config.json"),
    }
    assert stored["checkpoint/config.json"] == EMPTY
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


@pytest.mark.parametrize(("said", "change"), CHANGES.items(), ids=CHANGES.keys())
def test_every_change_is_seen(said: str, change: Callable[[Record], object], record: Record) -> None:
    change(record)
    (found,) = list_changed_files(record.folder)
    assert said in found
