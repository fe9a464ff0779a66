"""The index is used while files are the same, and never else; without it the answers are the same."""

import json
import os
import time
from pathlib import Path

import pytest

from gkd_lab.store import Record
from gkd_lab.store.index import RecordIndex

LONG_AGO = 1_700_000_000


class Reader:
    """Reads a status, and counts how often."""

    def __init__(self, root: Path, folder: str) -> None:
        self.record, self.folder, self.times = Record(root / folder), folder, 0

    def __call__(self) -> dict[str, object]:
        self.times += 1
        return {"status": self.record.read_status()}

    def ask(self, index: RecordIndex) -> object:
        return index.get_facts(self.folder, ["status.json"], self)["status"]

    def write(self, at: float = LONG_AGO, **facts: object) -> None:
        self.record.mark_done(**facts)
        os.utime(self.record.status_file, (at, at))


def readers(root: Path, count: int = 500) -> list[Reader]:
    found = [Reader(root, f"cell-{n}") for n in range(count)]
    for n, reader in enumerate(found):
        reader.write(steps=n)
    return found


def asked(root: Path, found: list[Reader]) -> list[object]:
    index = RecordIndex(root)
    answers = [reader.ask(index) for reader in found]
    index.save()
    return answers


def test_a_record_is_read_once_while_it_is_the_same(tmp_path: Path) -> None:
    found = readers(tmp_path)
    first = asked(tmp_path, found)
    assert asked(tmp_path, found) == first == [{"state": "done", "steps": n} for n in range(500)]
    assert {reader.times for reader in found} == {1}


@pytest.mark.parametrize("later", [0, 1])
def test_a_status_that_changed_is_read_again(later: int, tmp_path: Path) -> None:
    """By its inode even where time and size are the same."""
    found = readers(tmp_path)
    asked(tmp_path, found)
    found[3].write(LONG_AGO + later, steps=7)
    assert asked(tmp_path, found)[3] == {"state": "done", "steps": 7}
    assert [reader.times for reader in found[2:5]] == [1, 2, 1]
    found[4].record.status_file.unlink()
    assert asked(tmp_path, found)[4] == {}


def test_what_was_written_just_now_is_not_kept(tmp_path: Path) -> None:
    found = readers(tmp_path, 501)
    found[0].write(time.time(), steps=1)
    asked(tmp_path, found)
    asked(tmp_path, found)
    assert [found[0].times, found[1].times] == [2, 1]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 0, "records": {}}', '{"version": 1, "rec'])
def test_a_damaged_index_or_one_of_another_version_is_made_anew(text: str, tmp_path: Path) -> None:
    found = readers(tmp_path)
    first = asked(tmp_path, found)
    path = tmp_path / ".cache" / "records.json"
    path.write_text(text)
    assert asked(tmp_path, found) == first
    assert len(json.loads(path.read_text())["records"]) == 500


def test_a_small_store_has_none_and_neither_has_one_where_nothing_can_be_written(tmp_path: Path) -> None:
    asked(tmp_path, readers(tmp_path, 20))
    assert not (tmp_path / ".cache").exists()
    (tmp_path / ".cache").write_text("a file in its place")
    found = readers(tmp_path)
    assert asked(tmp_path, found) == asked(tmp_path, found)
