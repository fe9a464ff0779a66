"""Locks on a record: a file lock on one machine, a heartbeat between machines."""

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
from gkd_lab.store import Record, heartbeat, lock, lock_owner

from .tiny_experiments import options, tiny_grid

HOLD_LOCK = """
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
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_owner, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_owner, "STALE_SECONDS", 0.4)


def write_remote_owner(record: Record, beats: int = 0, beat: str = "2001-01-01T00:00:00+00:00") -> None:
    """Write the owner file of a machine whose file locks do not reach this one and whose clock is wrong."""
    facts = {"host": "far", "pid": 7, "machine": "far/1", "token": "t", "beats": beats, "beat": beat}
    (record.folder / ".owner.json").write_text(json.dumps(facts))
    (record.folder / ".lock").touch()


@contextmanager
def run_remote_owner(record: Record) -> Iterator[None]:
    """Write heartbeats of that machine until the block ends, as if it lost power then."""
    dead_content = threading.Event()

    def beat() -> None:
        for beats in range(10_000):
            write_remote_owner(record, beats)
            if dead_content.wait(0.05):
                return

    write_remote_owner(record)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        dead_content.set()
        thread.join()


def test_remote_owner_keeps_the_lock_while_it_beats(record: Record, fast_heartbeat: None) -> None:
    with run_remote_owner(record):
        assert record.is_locked()
        with pytest.raises(Timeout):
            record.lock().acquire(timeout=1.0)  # longer than a silent owner counts as alive
        assert record.is_locked()
        assert record.read_state() == "running"


@pytest.mark.parametrize("clock_time", ("2001-01-01T00:00:00+00:00", "2099-01-01T00:00:00+00:00"))
def test_silent_remote_owner_is_replaced_by_the_local_clock(
    record: Record, fast_heartbeat: None, clock_time: str
) -> None:
    write_remote_owner(record, beat=clock_time)
    with pytest.raises(Timeout):
        record.lock().acquire(timeout=0.2)
    start_time = time.monotonic()
    with record.lock():
        assert time.monotonic() - start_time < 5
        owner = lock.read_owner(record.folder)
        assert owner is not None
        assert owner["pid"] == os.getpid()
    assert not record.is_locked()
    assert sorted(path.name for path in record.folder.iterdir()) == [".lock"]


def test_dead_local_owner_is_replaced_at_once(record: Record) -> None:
    command = [sys.executable, "-c", HOLD_LOCK, str(record.folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    owner = lock.read_owner(record.folder)
    assert owner is not None
    assert owner["pid"] == holder.pid
    with pytest.raises(Timeout):
        record.lock().acquire(timeout=0)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert lock.read_owner(record.folder) == owner
    assert not record.is_locked()
    with record.lock().acquire(timeout=0):
        assert record.is_locked()
    assert lock.read_owner(record.folder) is None


def test_held_lock_beats_and_released_lock_leaves_no_file(record: Record, fast_heartbeat: None) -> None:
    with record.lock():
        first = lock.read_owner(record.folder)
        time.sleep(0.4)
        later = lock.read_owner(record.folder)
        assert first is not None
        assert later is not None
        assert later["beats"] > first["beats"]
        assert {"host", "pid", "started", "beat"} <= later.keys()
    assert lock.read_owner(record.folder) is None


def test_replaced_owner_notices_and_keeps_the_new_owners_file(record: Record, fast_heartbeat: None) -> None:
    folder_lock = record.lock().acquire()
    heartbeat.require_locks()
    remote_file = record.folder / "other"
    remote_file.write_text(json.dumps({"host": "far", "machine": "far/1", "token": "t"}))
    remote_file.replace(record.folder / ".owner.json")
    deadline = time.monotonic() + 5
    with pytest.raises(heartbeat.LockLost, match="on far took over") as caught:
        while time.monotonic() < deadline:
            heartbeat.require_locks()
            time.sleep(0.02)
    assert caught.value.filename == str(record.folder)
    folder_lock.release()
    owner = lock.read_owner(record.folder)
    assert owner is not None
    assert owner["host"] == "far"
    heartbeat.require_locks()


def test_one_of_many_machines_replaces_a_dead_owner(record: Record) -> None:
    """Threads that skip the file lock stand for machines that it does not reach."""
    path = record.folder / ".owner.json"
    for _ in range(30):
        write_remote_owner(record)
        dead_content = path.read_bytes()
        start, taken_tokens = threading.Barrier(6), []

        def take(
            start: threading.Barrier = start,
            taken_tokens: list[str] = taken_tokens,
            dead_content: bytes = dead_content,
        ) -> None:
            own_heartbeat = heartbeat.Heartbeat(path)
            start.wait()
            if heartbeat.replace_dead_owner(path, dead_content, own_heartbeat):
                taken_tokens.append(own_heartbeat.token)

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owner = lock.read_owner(record.folder)
        assert owner is not None
        assert taken_tokens == [owner["token"]]
        assert [file.name for file in record.folder.glob(".owner*")] == [".owner.json"]


def test_interrupted_replacement_is_finished_by_the_next_process(
    record: Record, fast_heartbeat: None
) -> None:
    write_remote_owner(record)
    (record.folder / ".owner-t.taken").touch()
    with record.lock().acquire(timeout=10):
        pass
    assert sorted(path.name for path in record.folder.iterdir()) == [".lock"]


def test_damaged_heartbeat_goes_stale_too(record: Record, fast_heartbeat: None) -> None:
    (record.folder / ".owner.json").write_bytes(b'{"host": "fa')
    with pytest.raises(Timeout):
        record.lock().acquire(timeout=0.1)
    with record.lock().acquire(timeout=10):
        pass


def test_pack_lock_locks_the_free_cells_of_a_pack(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    run_options = options(tmp_path / "outputs")
    first = min(grid.cells, key=lambda cell: cell.folder)
    with run_options.store.get_record(first).lock():
        with PackLock(grid.cells, run_options) as pack_lock:
            assert pack_lock.busy_cells == [first]
            assert pack_lock.locked_cells == [cell for cell in grid.cells if cell is not first]
        with PackLock(grid.cells, run_options) as second_lock:
            assert len(second_lock.locked_cells) == 5, "the others are free again"
