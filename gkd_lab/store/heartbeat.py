"""Heartbeats of the locks that this process holds, and the check that it still holds them before it writes.

A process that was stopped or cut off for longer than the limit has lost its locks: another has its work.
`require_lock` finds that out by reading the owner file, before each write into a record.
"""

import errno
import hashlib
import json
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from gkd_lab.store.lock_owner import (
    describe_process,
    format_utc_time,
    is_owner_dead,
    measure_silence,
    parse_owner,
    read_bytes,
    read_time_limits,
)

_HEARTBEAT_BYTES = 1024
"""Fixed size of a heartbeat file, so that a beat is one write and no reader sees half of it."""


class LockLost(OSError):
    """Another process has taken over a lock of this one, which must write nothing more."""

    def __init__(self, folder: Path, owner: str) -> None:
        reason = f"this process was silent too long, and {owner} took over its work"
        super().__init__(errno.ESTALE, reason, str(folder))


class Heartbeat:
    """Owner file of one lock that this process holds, rewritten every few seconds."""

    def __init__(self, path: Path, *, has_file_lock: bool = True) -> None:
        self.path, self.has_file_lock = path, has_file_lock
        self.folder = os.path.abspath(path.parent)
        self.token, self.is_lost = uuid.uuid4().hex, False
        self.started, self.beats, self._descriptor = format_utc_time(), 0, -1
        self.beat_seconds, self.stale_seconds = read_time_limits()
        self._last_beat = _read_clock()

    def create_file(self, path: Path) -> None:
        """Create the owner file with a first beat. FileExistsError if there is one, OSError if unwritable."""
        # Exclusive creation is atomic on NFS too, from version 3 on.
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            os.pwrite(self._descriptor, self._encode_content(), 0)
        except OSError:
            os.close(self._descriptor)
            path.unlink(missing_ok=True)
            raise

    def write_beat(self) -> None:
        """Rewrite the owner file; set `is_lost` if another process has replaced it. Ignores other errors."""
        self.beats += 1
        try:
            self._read_token()
            os.pwrite(self._descriptor, self._encode_content(), 0)
            os.fsync(self._descriptor)  # a network file system may delay it otherwise
            self._last_beat = _read_clock()
        except OSError as error:
            # A beat that cannot be written is missed; writing the record will meet the same error. ESTALE: a
            # server has no such file any more, because another machine replaced it.
            self.is_lost = self.is_lost or error.errno == errno.ESTALE

    def require(self) -> None:
        """Raise LockLost if another process has this lock. OSError where that cannot be found out."""
        if not self.is_lost:
            # A new beat first: whoever waits for this lock then waits for the whole limit again.
            if self.is_overdue():
                self.write_beat()
            self._read_token()
        if self.is_lost:
            raise LockLost(self.path.parent, self._describe_owner())

    def is_overdue(self) -> bool:
        """Return whether a beat was missed, as after this process or its machine was stopped."""
        return _read_clock() - self._last_beat > 2 * self.beat_seconds

    def stop(self) -> None:
        """Stop beating and remove the owner file, unless another process owns it by now."""
        _unregister_heartbeat(self)
        # A file that cannot be removed goes stale.
        with suppress(OSError):
            self._read_token()
            if not self.is_lost:
                self.path.unlink()
        os.close(self._descriptor)

    def discard(self, path: Path) -> None:
        """Remove the owner file that was created at `path` and is not used."""
        os.close(self._descriptor)
        path.unlink(missing_ok=True)

    def _read_token(self) -> None:
        """Set `is_lost` if the owner file is not this heartbeat's; what is lost stays lost."""
        content = read_bytes(self.path)
        self.is_lost = self.is_lost or content is None or parse_owner(content).get("token") != self.token

    def _describe_owner(self) -> str:
        """Return the present owner as text: its host and process, where there is one."""
        owner = parse_owner(read_bytes(self.path) or b"")
        return f"process {owner.get('pid')} on {owner['host']}" if owner.get("host") else "another process"

    def _encode_content(self) -> bytes:
        """Return the owner's facts as JSON bytes, padded to `_HEARTBEAT_BYTES`."""
        facts = {
            **describe_process(),
            **{"started": self.started, "beat": format_utc_time(), "beats": self.beats},
            **{"stale_after": self.stale_seconds, "file_lock": self.has_file_lock, "token": self.token},
        }
        return json.dumps(facts).encode().ljust(_HEARTBEAT_BYTES - 1) + b"\n"


def start_heartbeat(path: Path, *, has_file_lock: bool) -> Heartbeat | None:
    """Create the owner file, or replace a dead owner's, and start beating; None if the owner lives.

    has_file_lock: whether the caller holds the file lock; without it the owner file alone is the lock.
    """
    heartbeat = Heartbeat(path, has_file_lock=has_file_lock)
    try:
        heartbeat.create_file(path)
    except FileExistsError:
        content = read_bytes(path)
        if content is None or not is_owner_dead(path, content, has_file_lock=has_file_lock):
            return None
        if not replace_dead_owner(path, content, heartbeat):
            return None
    _register_heartbeat(heartbeat)
    return heartbeat


def replace_dead_owner(path: Path, dead_content: bytes, heartbeat: Heartbeat) -> bool:
    """Replace a dead owner's file by `heartbeat` and return True; False if another process was faster.

    Of several processes that try, the one that creates the gate file replaces the owner, by rename.
    """
    gate, claim, start = _build_gate_path(path, dead_content), heartbeat.token.encode(), _read_clock()
    try:
        with gate.open("xb") as file:
            file.write(claim)
    except FileExistsError:
        gate_content = read_bytes(gate)
        if gate_content is not None and measure_silence(gate, gate_content) >= heartbeat.stale_seconds:
            gate.unlink(missing_ok=True)  # its creator died before removing it
        return False
    temporary_path = path.with_name(f".owner-{heartbeat.token}.part")
    try:
        heartbeat.create_file(temporary_path)
        # Whoever was stopped in here may have lost the gate to others.
        is_first = read_bytes(path) == dead_content and read_bytes(gate) == claim
        if not is_first or _read_clock() - start > heartbeat.stale_seconds / 2:
            heartbeat.discard(temporary_path)
            return False
        temporary_path.replace(path)
        return True
    finally:
        if read_bytes(gate) == claim:
            gate.unlink(missing_ok=True)


def _build_gate_path(path: Path, dead_content: bytes) -> Path:
    """Return the path of the gate to the takeover of this very owner: its token, or a hash of its file."""
    token = parse_owner(dead_content).get("token") or hashlib.sha256(dead_content).hexdigest()[:32]
    return path.with_name(f".owner-{token}.taken")


def _read_clock() -> float:
    """Return seconds of a clock that, unlike `time.monotonic`, also runs while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


# ---- the check before a write ----


def require_lock(path: Path | str) -> None:
    """Raise LockLost if this process has lost a lock, or no longer holds that of a folder around `path`.

    A path outside of the folders that this process has locked is not checked.
    """
    if not _active_heartbeats:
        return
    absolute_path = os.path.abspath(path)
    for heartbeat in list(_active_heartbeats):
        if heartbeat.is_lost or _is_below(absolute_path, heartbeat.folder):
            heartbeat.require()


def require_locks() -> None:
    """Raise LockLost if this process has lost any of its locks; owner files are read after a missed beat."""
    for heartbeat in list(_active_heartbeats):
        if heartbeat.is_lost or heartbeat.is_overdue():
            heartbeat.require()


def _is_below(path: str, folder: str) -> bool:
    """Return whether an absolute path is a folder or below it."""
    return path == folder or path.startswith(folder + os.sep)


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
    """Write all active heartbeats at the pace of the fastest, until none is active."""
    global _heartbeat_thread
    with _heartbeat_condition:
        last_round = time.monotonic()
        while _active_heartbeats:
            # Every released lock wakes this thread, which ends with the last one.
            due = last_round + min(heartbeat.beat_seconds for heartbeat in _active_heartbeats)
            _heartbeat_condition.wait(max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                for heartbeat in _active_heartbeats:
                    heartbeat.write_beat()
                last_round = time.monotonic()
        _heartbeat_thread = None


def _reset_forked_process() -> None:
    """Drop the parent's heartbeats and thread in a forked child, which does not hold its locks."""
    global _heartbeat_condition, _heartbeat_thread
    _heartbeat_condition, _heartbeat_thread = threading.Condition(), None
    _active_heartbeats.clear()


os.register_at_fork(after_in_child=_reset_forked_process)
