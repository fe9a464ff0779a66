"""A claim on a folder: a lock of this machine's kernel, and a heartbeat that other machines can see.

On one machine the lock is the truth: the kernel frees it when its owner dies. Locks may not reach other
machines, so an owner there counts as dead once its heartbeat has not changed for `STALE` seconds of the
watcher's own clock. The times in a heartbeat are for people: clocks of two machines are never compared.
"""

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

BEAT_SECONDS = 5.0
"""Seconds between two beats."""
STALE_SECONDS = 60.0
"""Seconds without a beat after which an owner on another machine counts as dead."""

_LOCK_FILE, _OWNER_FILE = ".lock", ".owner.json"
_HEARTBEAT_BYTES = 512
"""Bytes of a heartbeat: of one length, so that a beat is one write and no reader meets half of it."""


class FolderLock:
    """The right to work in `folder`, for as long as it is held. A context manager; acquires once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / _LOCK_FILE)
        self._heartbeat: Heartbeat | None = None

    def acquire(self, timeout: float = -1, poll_interval: float = 0.05) -> "FolderLock":
        """Wait up to `timeout` seconds, below 0 for ever. Raises filelock's Timeout."""
        end = time.monotonic() + timeout
        while not self._try_acquire():
            if timeout >= 0 and time.monotonic() >= end:
                raise Timeout(str(self.folder / _LOCK_FILE))
            time.sleep(poll_interval)
        return self

    def release(self) -> None:
        """Let others have it."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        self._lock.release()

    def __enter__(self) -> "FolderLock":
        return self if self._heartbeat is not None else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try_acquire(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            self._heartbeat = _start_heartbeat(self.folder / _OWNER_FILE)
        finally:
            if self._heartbeat is None:
                self._lock.release()
        return self._heartbeat is not None


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Who claims the folder: `host`, `pid`, `started`, `beat` (its own clock); a dead owner's stays there."""
    content = _read_bytes(folder / _OWNER_FILE)
    return None if content is None else _parse_owner(content)


def is_locked(folder: Path) -> bool:
    """Whether another process is at work in the folder, as far as can be told without waiting.

    One on another machine is believed until this process has watched it miss its beats.
    """
    if not (folder / _LOCK_FILE).exists():
        return False
    try:
        with FileLock(folder / _LOCK_FILE, timeout=0):
            return _has_live_remote_owner(folder / _OWNER_FILE)
    except Timeout:
        return True
    except OSError:  # a store that can only be read
        return _has_live_remote_owner(folder / _OWNER_FILE)


def find_lost_folder() -> Path | None:
    """A folder whose claim another process took from this one, which was silent for too long."""
    return next((one.path.parent for one in list(_active_heartbeats) if one.is_lost), None)


class Heartbeat:
    """The file of one claim that this process holds, rewritten every `BEAT` seconds."""

    def __init__(self, path: Path) -> None:
        self.path, self.token, self.is_lost = path, uuid.uuid4().hex, False
        self.started, self.beats, self._descriptor = _format_utc_time(), 0, -1

    def create_file(self, path: Path) -> None:
        """Make the file. Raises FileExistsError, and OSError where nothing can be written."""
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            os.pwrite(self._descriptor, self._encode_content(), 0)
        except OSError:
            os.close(self._descriptor)
            path.unlink(missing_ok=True)
            raise

    def write_beat(self) -> None:
        """Rewrite the file; where another took the claim, the file that is rewritten has no name any more."""
        self.beats += 1
        # A beat that cannot be written is a missed one; the work's own files will meet the same fault.
        with suppress(OSError):
            content = _read_bytes(self.path)
            self.is_lost = content is None or _parse_owner(content).get("token") != self.token
            os.pwrite(self._descriptor, self._encode_content(), 0)
            os.fsync(self._descriptor)  # a network's file system may keep it back otherwise

    def stop(self) -> None:
        """Remove the file, unless it is another's by now."""
        _unregister_heartbeat(self)
        # One that cannot be removed falls silent.
        with suppress(OSError):
            content = _read_bytes(self.path)
            if content is not None and _parse_owner(content).get("token") == self.token:
                self.path.unlink()
        os.close(self._descriptor)

    def _encode_content(self) -> bytes:
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self.started,
            "beat": _format_utc_time(),
        }
        more = {"beats": self.beats, "machine": _identify_machine(), "token": self.token}
        return json.dumps({**facts, **more}).encode().ljust(_HEARTBEAT_BYTES - 1) + b"\n"


def _start_heartbeat(path: Path) -> Heartbeat | None:
    """This process's heartbeat at `path`; None while another machine's owner is alive. Holds the lock."""
    mine = Heartbeat(path)
    try:
        mine.create_file(path)
    except FileExistsError:
        content = _read_bytes(path)
        if (
            content is None
            or not _is_owner_dead(path, content)
            or not _replace_dead_owner(path, content, mine)
        ):
            return None
    _register_heartbeat(mine)
    return mine


def _replace_dead_owner(path: Path, dead_content: bytes, heartbeat: Heartbeat) -> bool:
    """Put ours in the place of a dead one; of several machines that try, the one that makes the gate does."""
    gate = path.with_name(f".owner-{_parse_owner_token(dead_content)}.taken")
    try:
        os.close(os.open(gate, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if _measure_silence(gate, b"") >= STALE_SECONDS:
            gate.unlink(missing_ok=True)  # who made it died right there
        return False
    try:
        if _read_bytes(path) != dead_content:
            return False
        part = path.with_name(f".owner-{heartbeat.token}.part")
        heartbeat.create_file(part)
        part.replace(path)
        return True
    finally:
        gate.unlink(missing_ok=True)


def _is_owner_dead(path: Path, content: bytes) -> bool:
    """Of an owner on this machine the caller's holding its lock says it."""
    return (
        _parse_owner(content).get("machine") == _identify_machine()
        or _measure_silence(path, content) >= STALE_SECONDS
    )


def _has_live_remote_owner(path: Path) -> bool:
    content = _read_bytes(path)
    return content is not None and not _is_owner_dead(path, content)


_first_sightings: dict[Path, tuple[bytes, float]] = {}


def _measure_silence(path: Path, content: bytes) -> float:
    """Seconds since this process first saw the file as it is now."""
    before, since = _first_sightings.get(path, (None, 0.0))
    if before != content:
        since = time.monotonic()
        _first_sightings[path] = content, since
    return time.monotonic() - since


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse_owner(content: bytes) -> dict[str, Any]:
    """Empty of a file that is being written or is damaged; it is watched like any other."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _parse_owner_token(content: bytes) -> str:
    return str(_parse_owner(content).get("token") or hashlib.sha256(content).hexdigest()[:32])


def _format_utc_time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _identify_machine() -> str:
    """Name and boot of the machine; containers of one kernel count as several, which costs a wait at most."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else uuid.getnode()}"


# ---- the thread that beats for all claims of this process ----

_active_heartbeats: list[Heartbeat] = []
_heartbeat_condition = threading.Condition()
_heartbeat_thread: threading.Thread | None = None


def _register_heartbeat(heartbeat: Heartbeat) -> None:
    global _heartbeat_thread
    with _heartbeat_condition:
        _active_heartbeats.append(heartbeat)
        if _heartbeat_thread is None:
            _heartbeat_thread = threading.Thread(target=_run_heartbeat_thread, name="heartbeat", daemon=True)
            _heartbeat_thread.start()


def _unregister_heartbeat(heartbeat: Heartbeat) -> None:
    with _heartbeat_condition:
        if heartbeat in _active_heartbeats:
            _active_heartbeats.remove(heartbeat)
            _heartbeat_condition.notify()


def _run_heartbeat_thread() -> None:
    global _heartbeat_thread
    with _heartbeat_condition:
        due = time.monotonic() + BEAT_SECONDS
        while _active_heartbeats:
            # Woken by each claim that ends: with none left this thread ends too.
            _heartbeat_condition.wait(max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                for one in _active_heartbeats:
                    one.write_beat()
                due = time.monotonic() + BEAT_SECONDS
        _heartbeat_thread = None


def _reset_forked_process() -> None:
    global _heartbeat_condition, _heartbeat_thread
    _heartbeat_condition, _heartbeat_thread = threading.Condition(), None
    _active_heartbeats.clear()


os.register_at_fork(after_in_child=_reset_forked_process)
