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

BEAT = 5.0
"""Seconds between two beats."""
STALE = 60.0
"""Seconds without a beat after which an owner on another machine counts as dead."""

_LOCK, _OWNER = ".lock", ".owner.json"
_LENGTH = 512
"""Bytes of a heartbeat: of one length, so that a beat is one write and no reader meets half of it."""


class Claim:
    """The right to work in `folder`, for as long as it is held. A context manager; acquires once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / _LOCK)
        self._heartbeat: Heartbeat | None = None

    def acquire(self, timeout: float = -1, poll_interval: float = 0.05) -> "Claim":
        """Wait up to `timeout` seconds, below 0 for ever. Raises filelock's Timeout."""
        end = time.monotonic() + timeout
        while not self._try():
            if timeout >= 0 and time.monotonic() >= end:
                raise Timeout(str(self.folder / _LOCK))
            time.sleep(poll_interval)
        return self

    def release(self) -> None:
        """Let others have it."""
        if self._heartbeat is not None:
            self._heartbeat.end()
            self._heartbeat = None
        self._lock.release()

    def __enter__(self) -> "Claim":
        return self if self._heartbeat is not None else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            self._heartbeat = _taken(self.folder / _OWNER)
        finally:
            if self._heartbeat is None:
                self._lock.release()
        return self._heartbeat is not None


def owner(folder: Path) -> dict[str, Any] | None:
    """Who claims the folder: `host`, `pid`, `started`, `beat` (its own clock); a dead owner's stays there."""
    content = _read(folder / _OWNER)
    return None if content is None else _facts(content)


def is_claimed(folder: Path) -> bool:
    """Whether another process is at work in the folder, as far as can be told without waiting.

    One on another machine is believed until this process has watched it miss its beats.
    """
    if not (folder / _LOCK).exists():
        return False
    try:
        with FileLock(folder / _LOCK, timeout=0):
            return _is_elsewhere(folder / _OWNER)
    except Timeout:
        return True
    except OSError:  # a store that can only be read
        return _is_elsewhere(folder / _OWNER)


def lost() -> Path | None:
    """A folder whose claim another process took from this one, which was silent for too long."""
    return next((one.path.parent for one in list(_beating) if one.is_lost), None)


class Heartbeat:
    """The file of one claim that this process holds, rewritten every `BEAT` seconds."""

    def __init__(self, path: Path) -> None:
        self.path, self.token, self.is_lost = path, uuid.uuid4().hex, False
        self.started, self.beats, self._file = _now(), 0, -1

    def appear(self, path: Path) -> None:
        """Make the file. Raises FileExistsError, and OSError where nothing can be written."""
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            os.pwrite(self._file, self._content(), 0)
        except OSError:
            os.close(self._file)
            path.unlink(missing_ok=True)
            raise

    def beat(self) -> None:
        """Rewrite the file; where another took the claim, the file that is rewritten has no name any more."""
        self.beats += 1
        # A beat that cannot be written is a missed one; the work's own files will meet the same fault.
        with suppress(OSError):
            content = _read(self.path)
            self.is_lost = content is None or _facts(content).get("token") != self.token
            os.pwrite(self._file, self._content(), 0)
            os.fsync(self._file)  # a network's file system may keep it back otherwise

    def end(self) -> None:
        """Remove the file, unless it is another's by now."""
        _stop_beating(self)
        # One that cannot be removed falls silent.
        with suppress(OSError):
            content = _read(self.path)
            if content is not None and _facts(content).get("token") == self.token:
                self.path.unlink()
        os.close(self._file)

    def _content(self) -> bytes:
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "started": self.started, "beat": _now()}
        more = {"beats": self.beats, "machine": _machine(), "token": self.token}
        return json.dumps({**facts, **more}).encode().ljust(_LENGTH - 1) + b"\n"


def _taken(path: Path) -> Heartbeat | None:
    """This process's heartbeat at `path`; None while another machine's owner is alive. Holds the lock."""
    mine = Heartbeat(path)
    try:
        mine.appear(path)
    except FileExistsError:
        content = _read(path)
        if content is None or not _is_dead(path, content) or not _replaced(path, content, mine):
            return None
    _keep_beating(mine)
    return mine


def _replaced(path: Path, dead: bytes, mine: Heartbeat) -> bool:
    """Put ours in the place of a dead one; of several machines that try, the one that makes the gate does."""
    gate = path.with_name(f".owner-{_token(dead)}.taken")
    try:
        os.close(os.open(gate, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if _silent_for(gate, b"") >= STALE:
            gate.unlink(missing_ok=True)  # who made it died right there
        return False
    try:
        if _read(path) != dead:
            return False
        part = path.with_name(f".owner-{mine.token}.part")
        mine.appear(part)
        part.replace(path)
        return True
    finally:
        gate.unlink(missing_ok=True)


def _is_dead(path: Path, content: bytes) -> bool:
    """Of an owner on this machine the caller's holding its lock says it."""
    return _facts(content).get("machine") == _machine() or _silent_for(path, content) >= STALE


def _is_elsewhere(path: Path) -> bool:
    content = _read(path)
    return content is not None and not _is_dead(path, content)


_seen: dict[Path, tuple[bytes, float]] = {}


def _silent_for(path: Path, content: bytes) -> float:
    """Seconds since this process first saw the file as it is now."""
    before, since = _seen.get(path, (None, 0.0))
    if before != content:
        since = time.monotonic()
        _seen[path] = content, since
    return time.monotonic() - since


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _facts(content: bytes) -> dict[str, Any]:
    """Empty of a file that is being written or is damaged; it is watched like any other."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _token(content: bytes) -> str:
    return str(_facts(content).get("token") or hashlib.sha256(content).hexdigest()[:32])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _machine() -> str:
    """Name and boot of the machine; containers of one kernel count as several, which costs a wait at most."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else uuid.getnode()}"


# ---- the thread that beats for all claims of this process ----

_beating: list[Heartbeat] = []
_guard = threading.Condition()
_thread: threading.Thread | None = None


def _keep_beating(heartbeat: Heartbeat) -> None:
    global _thread
    with _guard:
        _beating.append(heartbeat)
        if _thread is None:
            _thread = threading.Thread(target=_beat_on, name="heartbeat", daemon=True)
            _thread.start()


def _stop_beating(heartbeat: Heartbeat) -> None:
    with _guard:
        if heartbeat in _beating:
            _beating.remove(heartbeat)
            _guard.notify()


def _beat_on() -> None:
    global _thread
    with _guard:
        due = time.monotonic() + BEAT
        while _beating:
            # Woken by each claim that ends: with none left this thread ends too.
            _guard.wait(max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                for one in _beating:
                    one.beat()
                due = time.monotonic() + BEAT
        _thread = None


def _forget_the_parents() -> None:
    global _guard, _thread
    _guard, _thread = threading.Condition(), None
    _beating.clear()


os.register_at_fork(after_in_child=_forget_the_parents)
