"""The index is used only while files are unchanged; without it the facts are the same."""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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

    def read_facts(self, index: RecordIndex) -> object:
        return index.get_facts(self.folder, ["status.json"], self)["status"]

    def write(self, at: float = LONG_AGO, **facts: object) -> None:
        self.record.mark_done(**facts)
        os.utime(self.record.status_file, (at, at))


def create_readers(root: Path, count: int = 500) -> list[Reader]:
    readers = [Reader(root, f"cell-{n}") for n in range(count)]
    for n, reader in enumerate(readers):
        reader.write(steps=n)
    return readers


def read_all(root: Path, readers: list[Reader]) -> list[object]:
    index = RecordIndex(root)
    all_facts = [reader.read_facts(index) for reader in readers]
    index.save()
    return all_facts


def test_unchanged_record_is_read_once(tmp_path: Path) -> None:
    readers = create_readers(tmp_path)
    first_facts = read_all(tmp_path, readers)
    assert read_all(tmp_path, readers) == first_facts == [{"state": "done", "steps": n} for n in range(500)]
    assert {reader.times for reader in readers} == {1}


@pytest.mark.parametrize("later", [0, 1])
def test_changed_status_is_read_again(later: int, tmp_path: Path) -> None:
    """A replaced file has another inode, even where time and size are equal."""
    readers = create_readers(tmp_path)
    read_all(tmp_path, readers)
    readers[3].write(LONG_AGO + later, steps=7)
    assert read_all(tmp_path, readers)[3] == {"state": "done", "steps": 7}
    assert [reader.times for reader in readers[2:5]] == [1, 2, 1]
    readers[4].record.status_file.unlink()
    assert read_all(tmp_path, readers)[4] == {}


def test_recently_written_file_is_not_cached(tmp_path: Path) -> None:
    readers = create_readers(tmp_path, 501)
    readers[0].write(time.time(), steps=1)
    read_all(tmp_path, readers)
    read_all(tmp_path, readers)
    assert [readers[0].times, readers[1].times] == [2, 1]


def damage_byte(content: bytes) -> bytes:
    return content.replace(b'"steps": 7}', b'"steps": 8}')


def cut_end(content: bytes) -> bytes:
    return content[: len(content) // 2]


def age_version(content: bytes) -> bytes:
    return content.replace(b'"version": 5', b'"version": 4')


DAMAGES: list[Callable[[bytes], bytes]] = [
    *(damage_byte, cut_end, age_version),
    *(
        lambda content, text=text: text
        for text in (b"", b"\n", b"[]\n", b"\xff\n\n", b"{}", b'{"version": 5}')
    ),
    lambda _: b'{"version": 4, "layouts": [], "records": {}}\n',  # as written until the header was added
]


def test_damaged_or_old_index_is_rebuilt(tmp_path: Path) -> None:
    readers = create_readers(tmp_path)
    first_facts = read_all(tmp_path, readers)
    path = tmp_path / ".cache" / "records.json"
    content = path.read_bytes()
    for count, damage in enumerate(DAMAGES, 2):
        path.write_bytes(damage(content))
        assert path.read_bytes() != content
        assert read_all(tmp_path, readers) == first_facts
        assert path.read_bytes() == content
        assert {reader.times for reader in readers} == {count}


def test_an_index_that_cannot_be_read_is_done_without(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "records.json").mkdir(parents=True)
    readers = create_readers(tmp_path)
    assert read_all(tmp_path, readers) == read_all(tmp_path, readers)


def test_a_record_rewritten_in_the_same_instant_is_noticed(tmp_path: Path) -> None:
    """Not by its time: a rename gives another inode, a write in place another size."""
    readers = create_readers(tmp_path)
    read_all(tmp_path, readers)
    path = readers[3].record.status_file
    before = path.stat()
    path.write_text(path.read_text().replace('"steps": 3', '"steps": 33'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ino == before.st_ino
    assert read_all(tmp_path, readers)[3] == {"state": "done", "steps": 33}


def list_stored(root: str) -> list[object]:
    return read_all(Path(root), [Reader(Path(root), f"cell-{n}") for n in range(500)])


def test_processes_may_read_and_write_one_index_at_once(tmp_path: Path) -> None:
    create_readers(tmp_path)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as executor:
        facts = list(executor.map(list_stored, [str(tmp_path)] * 12))
    assert facts == [list_stored(str(tmp_path))] * 12
    assert [path.name for path in (tmp_path / ".cache").iterdir()] == ["records.json"]


def test_small_or_read_only_store_has_no_index(tmp_path: Path) -> None:
    read_all(tmp_path, create_readers(tmp_path, 20))
    assert not (tmp_path / ".cache").exists()
    (tmp_path / ".cache").write_text("a file, not a folder")
    readers = create_readers(tmp_path)
    assert read_all(tmp_path, readers) == read_all(tmp_path, readers)
