"""Lock on a record's folder: a file lock, and a heartbeat file that other machines can see.

`FolderLock` keeps two processes from training the same cell. On one machine the file lock decides: the kernel
frees it when its owner dies. File locks may not reach other machines, so a remote owner counts as dead once
its heartbeat has not changed for `STALE_SECONDS` of the observer's own clock. The times in a heartbeat are
for people: clocks of two machines are never compared.
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
"""Fixed size of a heartbeat file, so that a beat is one write and no reader sees half of it."""


class FolderLock:
    """Exclusive lock on `folder`, over processes and machines. A context manager; not reentrant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / _LOCK_FILE)
        self._heartbeat: Heartbeat | None = None

    def acquire(self, timeout: float = -1, poll_interval: float = 0.05) -> "FolderLock":
        """Wait up to `timeout` seconds (negative: for ever) and return self. Raises filelock's Timeout."""
        deadline = time.monotonic() + timeout
        while not self._try_acquire():
            if timeout >= 0 and time.monotonic() >= deadline:
                raise Timeout(str(self.folder / _LOCK_FILE))
            time.sleep(poll_interval)
        return self

    def release(self) -> None:
        """Stop the heartbeat, remove the owner file and free the file lock."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        self._lock.release()

    def __enter__(self) -> "FolderLock":
        return self if self._heartbeat is not None else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try_acquire(self) -> bool:
        """Try once to take the file lock and start the heartbeat; return whether the lock is now held."""
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
    """Return the owner's `host`, `pid`, `started`, `beat`, even if dead; None without an owner file."""
    content = _read_bytes(folder / _OWNER_FILE)
    return None if content is None else _parse_owner(content)


def is_locked(folder: Path) -> bool:
    """Return whether a live process, this one included, holds the lock on the folder; never waits.

    An owner on another machine counts as alive until this process has seen it miss its beats.
    """
    if not (folder / _LOCK_FILE).exists():
        return False
    try:
        with FileLock(folder / _LOCK_FILE, timeout=0):
            return _has_live_remote_owner(folder / _OWNER_FILE)
    except Timeout:
        return True
    except OSError:  # a read-only store
        return _has_live_remote_owner(folder / _OWNER_FILE)


def find_lost_folder() -> Path | None:
    """Return a folder whose lock another machine took from this process, silent too long; None: all held."""
    lost_heartbeats = (heartbeat for heartbeat in list(_active_heartbeats) if heartbeat.is_lost)
    return next((heartbeat.path.parent for heartbeat in lost_heartbeats), None)


class Heartbeat:
    """Owner file of one lock that this process holds, rewritten every `BEAT_SECONDS`."""

    def __init__(self, path: Path) -> None:
        self.path, self.token, self.is_lost = path, uuid.uuid4().hex, False
        self.started, self.beats, self._descriptor = _format_utc_time(), 0, -1

    def create_file(self, path: Path) -> None:
        """Create the owner file with a first beat. FileExistsError if there is one, OSError if unwritable."""
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            os.pwrite(self._descriptor, self._encode_content(), 0)
        except OSError:
            os.close(self._descriptor)
            path.unlink(missing_ok=True)
            raise

    def write_beat(self) -> None:
        """Rewrite the owner file; set `is_lost` if another process has replaced it. Ignores OSError."""
        self.beats += 1
        # A beat that cannot be written is missed; writing the record will meet the same error.
        with suppress(OSError):
            content = _read_bytes(self.path)
            self.is_lost = content is None or _parse_owner(content).get("token") != self.token
            os.pwrite(self._descriptor, self._encode_content(), 0)
            os.fsync(self._descriptor)  # a network file system may delay it otherwise

    def stop(self) -> None:
        """Stop beating and remove the owner file, unless another process owns it by now."""
        _unregister_heartbeat(self)
        # A file that cannot be removed goes stale.
        with suppress(OSError):
            content = _read_bytes(self.path)
            if content is not None and _parse_owner(content).get("token") == self.token:
                self.path.unlink()
        os.close(self._descriptor)

    def _encode_content(self) -> bytes:
        """Return the owner's facts as JSON bytes, padded to `_HEARTBEAT_BYTES`."""
        facts = {
            **{"host": socket.gethostname(), "pid": os.getpid(), "started": self.started},
            **{"beat": _format_utc_time(), "beats": self.beats},
            **{"machine": _identify_machine(), "token": self.token},
        }
        return json.dumps(facts).encode().ljust(_HEARTBEAT_BYTES - 1) + b"\n"


def _start_heartbeat(path: Path) -> Heartbeat | None:
    """Create the owner file, or replace a dead owner's, and start beating; None if a remote owner lives.

    The caller holds the file lock.
    """
    heartbeat = Heartbeat(path)
    try:
        heartbeat.create_file(path)
    except FileExistsError:
        content = _read_bytes(path)
        if content is None or not _is_owner_dead(path, content):
            return None
        if not _replace_dead_owner(path, content, heartbeat):
            return None
    _register_heartbeat(heartbeat)
    return heartbeat


def _replace_dead_owner(path: Path, dead_content: bytes, heartbeat: Heartbeat) -> bool:
    """Replace a dead owner's file by `heartbeat` and return True; False if another process was faster.

    Of several machines that try, the one that creates the gate file replaces the owner.
    """
    gate = path.with_name(f".owner-{_parse_owner_token(dead_content)}.taken")
    try:
        os.close(os.open(gate, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if _measure_silence(gate, b"") >= STALE_SECONDS:
            gate.unlink(missing_ok=True)  # its creator died before removing it
        return False
    try:
        if _read_bytes(path) != dead_content:
            return False
        temporary_path = path.with_name(f".owner-{heartbeat.token}.part")
        heartbeat.create_file(temporary_path)
        temporary_path.replace(path)
        return True
    finally:
        gate.unlink(missing_ok=True)


def _is_owner_dead(path: Path, content: bytes) -> bool:
    """Return whether an owner is dead: any on this machine, a remote one after `STALE_SECONDS` of silence.

    The caller holds the file lock, so a living owner is on another machine.
    """
    is_local = _parse_owner(content).get("machine") == _identify_machine()
    return is_local or _measure_silence(path, content) >= STALE_SECONDS


def _has_live_remote_owner(path: Path) -> bool:
    """Return whether there is an owner file whose owner, on another machine, does not count as dead."""
    content = _read_bytes(path)
    return content is not None and not _is_owner_dead(path, content)


_first_sightings: dict[Path, tuple[bytes, float]] = {}
"""Owner file -> its last content and when this process first saw that content."""


def _measure_silence(path: Path, content: bytes) -> float:
    """Return the seconds since this process first saw the file with this content; 0 for new content."""
    previous_content, first_seen = _first_sightings.get(path, (None, 0.0))
    if previous_content != content:
        first_seen = time.monotonic()
        _first_sightings[path] = content, first_seen
    return time.monotonic() - first_seen


def _read_bytes(path: Path) -> bytes | None:
    """Return the content of a file; None if it is missing."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse_owner(content: bytes) -> dict[str, Any]:
    """Return the facts in an owner file's bytes; {} for one that is damaged or being written."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _parse_owner_token(content: bytes) -> str:
    """Return the token in an owner file's bytes, or a hash of them if they have none."""
    return str(_parse_owner(content).get("token") or hashlib.sha256(content).hexdigest()[:32])


def _format_utc_time() -> str:
    """Return the present time in UTC as text, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _identify_machine() -> str:
    """Return `host name/boot id`, equal for all processes of a machine; a container counts as a machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else uuid.getnode()}"


# ---- one thread writes the heartbeats of all locks of this process ----

_active_heartbeats: list[Heartbeat] = []
_heartbeat_condition = threading.Condition()
_heartbeat_thread: threading.Thread | None = None


def _register_heartbeat(heartbeat: Heartbeat) -> None:
    """Add a heartbeat to those that the background thread writes; start the thread if needed."""
    global _heartbeat_thread
    with _heartbeat_condition:
        _active_heartbeats.append(heartbeat)
        if _heartbeat_thread is None:
            _heartbeat_thread = threading.Thread(target=_run_heartbeat_thread, name="heartbeat", daemon=True)
            _heartbeat_thread.start()


def _unregister_heartbeat(heartbeat: Heartbeat) -> None:
    """Remove a heartbeat from those that the background thread writes, and wake the thread."""
    with _heartbeat_condition:
        if heartbeat in _active_heartbeats:
            _active_heartbeats.remove(heartbeat)
            _heartbeat_condition.notify()


def _run_heartbeat_thread() -> None:
    """Write all active heartbeats every `BEAT_SECONDS`, until none is active."""
    global _heartbeat_thread
    with _heartbeat_condition:
        due = time.monotonic() + BEAT_SECONDS
        while _active_heartbeats:
            # Every released lock wakes this thread, which ends with the last one.
            _heartbeat_condition.wait(max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                for heartbeat in _active_heartbeats:
                    heartbeat.write_beat()
                due = time.monotonic() + BEAT_SECONDS
        _heartbeat_thread = None


def _reset_forked_process() -> None:
    """Drop the parent's heartbeats and thread in a forked child, which does not hold its locks."""
    global _heartbeat_condition, _heartbeat_thread
    _heartbeat_condition, _heartbeat_thread = threading.Condition(), None
    _active_heartbeats.clear()


os.register_at_fork(after_in_child=_reset_forked_process)
