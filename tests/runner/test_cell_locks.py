"""Claims on a record: on this machine by its kernel's lock, on another by a heartbeat."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import Timeout

from gkd_lab.runner.cell_locks import PackLock
from gkd_lab.runner.run import split_packs
from gkd_lab.store import Record, lock

from .tiny_experiments import options, tiny_grid

HOLD = """
import sys
from pathlib import Path
from gkd_lab.store import Record
with Record(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def record(tmp_path: Path) -> Record:
    (tmp_path / "record").mkdir()
    return Record(tmp_path / "record")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.4)


def written_elsewhere(record: Record, beats: int = 0, beat: str = "2001-01-01T00:00:00+00:00") -> None:
    """What a machine leaves whose locks do not reach this one, and whose clock is wrong."""
    facts = {"host": "far", "pid": 7, "machine": "far/1", "token": "t", "beats": beats, "beat": beat}
    (record.folder / ".owner.json").write_text(json.dumps(facts))
    (record.folder / ".lock").touch()


@contextmanager
def beating_elsewhere(record: Record) -> Iterator[None]:
    """That machine at work, until the block ends as if it had lost its power."""
    dead = threading.Event()

    def beat() -> None:
        for beats in range(10_000):
            written_elsewhere(record, beats)
            if dead.wait(0.05):
                return

    written_elsewhere(record)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        dead.set()
        thread.join()


def test_an_owner_on_another_machine_is_left_alone_while_it_beats(record: Record, quick: None) -> None:
    with beating_elsewhere(record):
        assert record.is_locked()
        with pytest.raises(Timeout):
            record.lock().acquire(timeout=1.0)  # longer than a dead one would be believed
        assert record.is_locked()
        assert record.read_state() == "running"


@pytest.mark.parametrize("clock", ("2001-01-01T00:00:00+00:00", "2099-01-01T00:00:00+00:00"))
def test_one_that_stops_beating_is_taken_over_by_the_watchers_own_clock(
    record: Record, quick: None, clock: str
) -> None:
    written_elsewhere(record, beat=clock)
    with pytest.raises(Timeout):
        record.lock().acquire(timeout=0.2)
    began = time.monotonic()
    with record.lock():
        assert time.monotonic() - began < 5
        found = lock.read_owner(record.folder)
        assert found is not None
        assert found["pid"] == os.getpid()
    assert not record.is_locked()
    assert sorted(path.name for path in record.folder.iterdir()) == [".lock"]


def test_a_dead_owner_on_this_machine_is_taken_over_at_once(record: Record) -> None:
    command = [sys.executable, "-c", HOLD, str(record.folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    there = lock.read_owner(record.folder)
    assert there is not None
    assert there["pid"] == holder.pid
    with pytest.raises(Timeout):
        record.lock().acquire(timeout=0)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert lock.read_owner(record.folder) == there
    assert not record.is_locked()
    with record.lock().acquire(timeout=0):
        assert record.is_locked()
    assert lock.read_owner(record.folder) is None


def test_a_held_claim_beats_and_a_released_one_leaves_nothing(record: Record, quick: None) -> None:
    with record.lock():
        first = lock.read_owner(record.folder)
        time.sleep(0.4)
        later = lock.read_owner(record.folder)
        assert first is not None
        assert later is not None
        assert later["beats"] > first["beats"]
        assert {"host", "pid", "started", "beat"} <= later.keys()
    assert lock.read_owner(record.folder) is None


def test_one_that_was_taken_over_knows_it_and_writes_nothing_into_the_new_owners_file(
    record: Record, quick: None
) -> None:
    lock = record.lock().acquire()
    assert lock.lost() is None
    other = record.folder / "other"
    other.write_text(json.dumps({"host": "far", "machine": "far/1", "token": "t"}))
    other.replace(record.folder / ".owner.json")
    deadline = time.monotonic() + 5
    while lock.lost() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.lost() == record.folder
    lock.release()
    there = lock.owner(record.folder)
    assert there is not None
    assert there["host"] == "far"
    assert lock.lost() is None


def test_of_many_machines_that_find_an_owner_dead_one_takes_over(record: Record) -> None:
    """Threads that skip the kernel's lock stand for machines that it does not reach."""
    path = record.folder / ".owner.json"
    for _ in range(30):
        written_elsewhere(record)
        dead = path.read_bytes()
        start, got = threading.Barrier(6), []

        def take(start: threading.Barrier = start, got: list[str] = got, dead: bytes = dead) -> None:
            mine = lock.Heartbeat(path)
            start.wait()
            if lock._replace_dead_owner(path, dead, mine):
                got.append(mine.token)

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        there = lock.read_owner(record.folder)
        assert there is not None
        assert got == [there["token"]]
        assert [one.name for one in record.folder.glob(".owner*")] == [".owner.json"]


def test_a_taking_over_that_was_cut_off_is_finished_by_the_next(record: Record, quick: None) -> None:
    written_elsewhere(record)
    (record.folder / ".owner-t.taken").touch()
    with record.lock().acquire(timeout=10):
        pass
    assert sorted(path.name for path in record.folder.iterdir()) == [".lock"]


def test_a_damaged_heartbeat_is_watched_like_any_other(record: Record, quick: None) -> None:
    (record.folder / ".owner.json").write_bytes(b'{"host": "fa')
    with pytest.raises(Timeout):
        record.lock().acquire(timeout=0.1)
    with record.lock().acquire(timeout=10):
        pass


def test_a_pack_is_claimed_whole_or_in_the_part_that_is_free(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    choices = options(tmp_path / "outputs")
    first = min(grid.cells, key=lambda cell: cell.folder)
    with choices.store.get_record(first).lock():
        with PackLock(grid.cells, choices) as claimed:
            assert claimed.busy_cells == [first]
            assert claimed.locked_cells == [cell for cell in grid.cells if cell is not first]
        with PackLock(grid.cells, choices) as again:
            assert len(again.locked_cells) == 5, "the others are free again"


def test_workers_of_one_run_get_packs_of_their_own(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    sizes = {
        n: [len(pack) for pack in split_packs(grid.cells, options(tmp_path, workers=n))] for n in (1, 2, 4, 9)
    }
    assert sizes == {1: [6], 2: [3, 3], 4: [2, 2, 2], 9: [1] * 6}
    asked = split_packs(grid.cells, options(tmp_path, workers=2, pack=4))
    assert [len(pack) for pack in asked] == [4, 2]
