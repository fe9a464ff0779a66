"""Lock on a record's folder: a file lock, and a heartbeat file that other machines can see.

`FolderLock` keeps two processes from training the same cell. On one machine the file lock decides: the kernel
frees it when its owner dies. File locks may not reach other machines, so a remote owner counts as dead once
its heartbeat has not changed for a minute of the observer's own clock. Some file systems have no file locks
(Lustre without the option `flock`, some of FUSE); there the heartbeat file alone is the lock.
"""

import errno
import fcntl
import tempfile
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gkd_lab.store.heartbeat import Heartbeat, start_heartbeat
from gkd_lab.store.lock_owner import has_live_owner, parse_owner, read_bytes, read_time_limits

_LOCK_FILE, _OWNER_FILE = ".lock", ".owner.json"
_MISSING_ERRNOS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What `flock` fails with where a file system has no file locks."""


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
        has_file_lock = has_file_locks(self.folder)
        if has_file_lock:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                return False
        try:
            self._heartbeat = start_heartbeat(self.folder / _OWNER_FILE, has_file_lock=has_file_lock)
        finally:
            if self._heartbeat is None:
                self._lock.release()
        return self._heartbeat is not None


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Return the owner's `host`, `pid`, `started`, `beat`, even if dead; None without an owner file."""
    content = read_bytes(folder / _OWNER_FILE)
    return None if content is None else parse_owner(content)


def is_locked(folder: Path) -> bool:
    """Return whether a live process, this one included, holds the lock on the folder; never waits.

    An owner on another machine counts as alive until this process has seen it miss its beats.
    """
    owner_file = folder / _OWNER_FILE
    if not (folder / _LOCK_FILE).exists() and not owner_file.exists():
        return False
    try:
        if not has_file_locks(folder):
            return has_live_owner(owner_file, has_file_lock=False)
        with FileLock(folder / _LOCK_FILE, timeout=0):
            return has_live_owner(owner_file, has_file_lock=True)
    except Timeout:
        return True
    except OSError:  # a read-only store
        return has_live_owner(owner_file, has_file_lock=False)


_devices_with_locks: dict[int, bool] = {}
"""Device number of a file system -> whether it has file locks."""


def has_file_locks(folder: Path) -> bool:
    """Return whether the file system of a folder has `flock`, found out once for each.

    Raises OSError where the folder is missing or cannot be written.
    """
    device = folder.stat().st_dev
    if device not in _devices_with_locks:
        _devices_with_locks[device] = _probe_file_lock(folder)
    return _devices_with_locks[device]


def explain_missing_file_locks(folder: Path) -> str | None:
    """Return a sentence for the user if the file system of a folder has no file locks, else None."""
    if has_file_locks(folder):
        return None
    return (
        f"{folder}: its file system has no file locks (flock), so heartbeats alone lock the cells: what a "
        f"killed process on another machine leaves is taken over after {read_time_limits()[1]:.0f} s"
    )


def _probe_file_lock(folder: Path) -> bool:
    """Return whether a new file in a folder can be locked by `flock`."""
    with tempfile.TemporaryFile(dir=folder, prefix=".probe-") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _MISSING_ERRNOS:
                raise
            return False
    return True
