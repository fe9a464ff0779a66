"""Locks on a file system without `flock`: heartbeats alone, taken over after the limit, never held twice."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout

from gkd_lab.cli.app import main
from gkd_lab.config.errors import ConfigError
from gkd_lab.store import Record, heartbeat, lock, lock_owner

from .tiny_experiments import tiny_grid

STALE_SECONDS = 2.0


@pytest.fixture
def no_file_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `flock` fail as on Lustre without the option `flock`."""

    def refuse_to_lock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse_to_lock)
    monkeypatch.setattr(lock, "_devices_with_locks", {})


@pytest.fixture
def record(tmp_path: Path) -> Record:
    (tmp_path / "record").mkdir()
    return Record(tmp_path / "record")


def start_stub_worker(host: str, folder: Path, *cells_to_die_in: str) -> "subprocess.Popen[str]":
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, lock_owner.STALE_VARIABLE: str(STALE_SECONDS)}
    command = [sys.executable, str(Path(__file__).with_name("stub_worker.py")), host, str(folder)]
    return subprocess.Popen([*command, *cells_to_die_in], env=environment, stderr=subprocess.PIPE, text=True)


def make_cells(folder: Path, count: int) -> list[Record]:
    records = [Record(folder / f"cell-{number:03}") for number in range(count)]
    for record in records:
        record.folder.mkdir(parents=True)
    return records


def count_runs(record: Record) -> int:
    return len((record.folder / "runs.jsonl").read_text().splitlines())


def write_owner(record: Record, **facts: Any) -> bytes:
    """Write an owner file, of a machine that died, unless `facts` tell of another; return its content."""
    owner = {
        "host": "far",
        "pid": 7,
        "machine": "far/1",
        "process": "1/7/1",
        "file_lock": False,
        "token": "t",
    }
    content = json.dumps({**owner, **facts}).encode()
    (record.folder / ".owner.json").write_bytes(content)
    return content


@pytest.mark.slow
def test_no_cell_of_500_runs_twice_in_8_processes_on_two_hosts(tmp_path: Path) -> None:
    """50 of the cells were left by a dead owner, so that all processes try to take them over at once."""
    records = make_cells(tmp_path, 500)
    for record in records[::10]:
        write_owner(record)
    workers = [start_stub_worker(f"host-{number % 2}", tmp_path) for number in range(8)]
    assert [worker.communicate()[1] for worker in workers] == [""] * 8
    assert [worker.returncode for worker in workers] == [0] * 8
    assert {record.read_status().get("state") for record in records} == {"done"}
    assert [count_runs(record) for record in records] == [1] * 500
    assert {record.read_status()["host"] for record in records} == {"host-0", "host-1"}
    leftovers = {path.name for record in records for path in record.folder.iterdir()}
    assert leftovers == {"runs.jsonl", "status.json"}


def test_cell_of_a_killed_owner_on_another_host_is_retaken_within_the_limit(tmp_path: Path) -> None:
    records = make_cells(tmp_path, 4)
    killed = start_stub_worker("far", tmp_path, "cell-002")
    assert killed.wait() == -9
    dead_owner = lock.read_owner(records[2].folder)
    assert dead_owner is not None
    assert dead_owner["host"] == "far"
    start = time.monotonic()
    heir = start_stub_worker("near", tmp_path)
    assert heir.communicate()[1] == ""
    assert STALE_SECONDS <= time.monotonic() - start < STALE_SECONDS + 5
    assert [record.read_status()["host"] for record in records] == ["far", "far", "near", "near"]
    assert [count_runs(record) for record in records] == [1, 1, 2, 1]


def test_cell_of_a_killed_owner_on_the_same_host_is_retaken_at_once(tmp_path: Path) -> None:
    records = make_cells(tmp_path, 3)
    assert start_stub_worker("near", tmp_path, "cell-001").wait() == -9
    heir = start_stub_worker("near", tmp_path)
    start = time.monotonic()
    while not records[1].read_status():
        assert time.monotonic() - start < 30
        time.sleep(0.01)
    assert heir.communicate()[1] == ""
    rows = map(json.loads, (records[1].folder / "runs.jsonl").read_text().splitlines())
    assert len({row["pid"] for row in rows}) == 2


def test_held_lock_keeps_this_process_and_its_children_out(record: Record, no_file_locks: None) -> None:
    with record.lock(), warnings.catch_warnings():
        warnings.simplefilter("error")  # filelock warns when it falls back to a file that never goes stale
        assert record.is_locked()
        with pytest.raises(Timeout):
            record.lock().acquire(timeout=0.2)
    assert not record.is_locked()
    with record.lock().acquire(timeout=0):
        pass
    assert list(record.folder.iterdir()) == []


def test_process_number_used_again_is_not_the_owner(record: Record, no_file_locks: None) -> None:
    facts = lock_owner.describe_process()
    write_owner(record, **facts)
    assert record.is_locked(), "this process"
    namespace, pid, start_ticks = facts["process"].split("/")
    write_owner(record, **{**facts, "process": f"{namespace}/{pid}/{int(start_ticks) - 1}"})
    assert not record.is_locked()
    with record.lock().acquire(timeout=0):
        pass


def test_owner_in_another_container_of_this_machine_is_judged_by_its_silence(
    record: Record, no_file_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_owner, "STALE_SECONDS", 0.3)
    write_owner(record, **{**lock_owner.describe_process(), "pid": 4_000_000, "process": "1/4000000/5"})
    with pytest.raises(Timeout):
        record.lock().acquire(timeout=0.1)
    with record.lock().acquire(timeout=5):
        pass


def test_owner_without_file_lock_is_safe_from_a_process_that_has_one(record: Record) -> None:
    """One mount of a file system may have file locks where another has none."""
    write_owner(record, **lock_owner.describe_process())
    with pytest.raises(Timeout):
        record.lock().acquire(timeout=0.1)
    write_owner(record, **{**lock_owner.describe_process(), "file_lock": True})
    with record.lock().acquire(timeout=0):
        pass


def test_owner_is_given_the_time_that_it_has_published(record: Record, no_file_locks: None) -> None:
    write_owner(record, stale_after=0.3)
    start = time.monotonic()
    with record.lock().acquire(timeout=10):
        assert 0.3 <= time.monotonic() - start < 5
    owner_file = record.folder / ".owner.json"
    with record.lock():
        assert json.loads(owner_file.read_bytes())["stale_after"] == lock_owner.STALE_SECONDS


def test_taker_that_was_stopped_halfway_gives_up_what_another_took(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow taker has made the gate; another finds it stale, removes it and takes the lock."""
    path = record.folder / ".owner.json"
    dead_content = write_owner(record)
    slow, fast = (heartbeat.Heartbeat(path, has_file_lock=False) for _ in range(2))
    create_file = slow.create_file

    def stop_and_create(temporary_path: Path) -> None:
        monkeypatch.setattr(fast, "stale_seconds", 0.0)
        assert not heartbeat.replace_dead_owner(path, dead_content, fast), "it removes the gate"
        monkeypatch.setattr(fast, "stale_seconds", 60.0)
        assert heartbeat.replace_dead_owner(path, dead_content, fast)
        create_file(temporary_path)

    monkeypatch.setattr(slow, "create_file", stop_and_create)
    assert not heartbeat.replace_dead_owner(path, dead_content, slow)
    assert json.loads(path.read_bytes())["token"] == fast.token
    assert [file.name for file in record.folder.iterdir()] == [".owner.json"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_missing_file_locks_are_found_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_devices_with_locks", {})
    assert lock.has_file_locks(tmp_path)
    assert lock.explain_missing_file_locks(tmp_path) is None

    def refuse_to_lock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "_devices_with_locks", {})
    monkeypatch.setattr(fcntl, "flock", refuse_to_lock)
    assert not lock.has_file_locks(tmp_path)
    note = lock.explain_missing_file_locks(tmp_path)
    assert note is not None
    assert "after 60 s" in note
    assert list(tmp_path.iterdir()) == []


def test_run_says_once_that_file_locks_are_missing(
    tmp_path: Path, no_file_locks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"grid": {"lmbda": [0, 0.5]}, "evaluations": [{"decoding": "greedy"}]}
    tiny_grid(tmp_path, "arithmetic", **changes)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["run", "tiny.yaml", "--pack", "off"])
    output = capsys.readouterr().err
    assert stop.value.code == 0, output
    assert output.count("no file locks (flock)") == 1
    assert list((tmp_path / "outputs").rglob(".owner*")) == []


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_limit_that_is_no_number_of_seconds_is_refused(
    text: str, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lock_owner.STALE_VARIABLE, text)
    with pytest.raises(ConfigError, match="GKD_LAB_STALE_SECONDS='?" + text):
        record.lock().acquire()
    monkeypatch.setenv(lock_owner.STALE_VARIABLE, "1.2")
    assert lock_owner.read_time_limits() == (pytest.approx(0.1), 1.2)
