"""Owner of a lock as its heartbeat file describes it, and whether that owner still lives.

An owner on another machine is judged by the changes of its heartbeat alone, on the observer's own clock: the
times in a heartbeat are for people, and clocks of two machines are never compared.
"""

import json
import os
import socket
import time
import uuid
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from gkd_lab.config.errors import ConfigError

BEAT_SECONDS = 5.0
"""Seconds between two beats."""
STALE_SECONDS = 60.0
"""Seconds without a beat after which an owner on another machine counts as dead."""
STALE_VARIABLE = "GKD_LAB_STALE_SECONDS"
"""Environment variable that replaces `STALE_SECONDS`; there are twelve beats in that time."""


def read_time_limits() -> tuple[float, float]:
    """Return (seconds between beats, seconds until an owner counts as dead) of this process.

    Raises ConfigError unless the environment variable is a number of seconds above 0.
    """
    text = os.environ.get(STALE_VARIABLE, "")
    if not text:
        return BEAT_SECONDS, STALE_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{STALE_VARIABLE}={text!r}: expected seconds above 0, such as {STALE_SECONDS:.0f}")
    return seconds / 12, seconds


def describe_process() -> dict[str, Any]:
    """Return the facts about this process that a heartbeat publishes: host, machine, process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": identify_machine(),
        "process": _identify_process(os.getpid()),
    }


def is_owner_dead(path: Path, content: bytes, *, has_file_lock: bool) -> bool:
    """Return whether the owner in a heartbeat file's content is dead.

    has_file_lock: whether the caller holds the file lock, which proves the death of an owner on this machine
    that held it too. Without it, the process table tells, and for any other owner its silence.
    """
    owner = parse_owner(content)
    if owner.get("machine") == identify_machine():
        if has_file_lock and owner.get("file_lock", True):
            return True
        is_running = _is_process_running(owner)
        if is_running is not None:
            return not is_running
    return measure_silence(path, content) >= _get_stale_seconds(owner)


def has_live_owner(path: Path, *, has_file_lock: bool) -> bool:
    """Return whether there is an owner file whose owner does not count as dead."""
    content = read_bytes(path)
    return content is not None and not is_owner_dead(path, content, has_file_lock=has_file_lock)


_first_sightings: dict[Path, tuple[bytes, float]] = {}
"""Owner file -> its last content and when this process first saw that content."""


def measure_silence(path: Path, content: bytes) -> float:
    """Return the seconds since this process first saw the file with this content; 0 for new content."""
    previous_content, first_seen = _first_sightings.get(path, (None, 0.0))
    if previous_content != content:
        first_seen = time.monotonic()
        _first_sightings[path] = content, first_seen
    return time.monotonic() - first_seen


def read_bytes(path: Path) -> bytes | None:
    """Return the content of a file; None if it is missing."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_owner(content: bytes) -> dict[str, Any]:
    """Return the facts in an owner file's bytes; {} for one that is damaged or being written."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def format_utc_time() -> str:
    """Return the present time in UTC as text, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def identify_machine() -> str:
    """Return `host name/boot id`, equal for all processes of a machine; a container counts as a machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else uuid.getnode()}"


def _get_stale_seconds(owner: dict[str, Any]) -> float:
    """Return the limit of silence that an owner has published, or this process's own."""
    published = owner.get("stale_after")
    return float(published) if isinstance(published, int | float) else read_time_limits()[1]


def _is_process_running(owner: dict[str, Any]) -> bool | None:
    """Return whether an owner on this machine runs; None where its process cannot be seen from here."""
    identity, pid = owner.get("process"), owner.get("pid")
    if not identity or not isinstance(pid, int) or not Path("/proc/self/stat").exists():
        return None
    if str(identity).partition("/")[0] != _identify_pid_namespace():
        return None  # of another container, whose process numbers are not ours
    return _identify_process(pid) == identity


def _identify_process(pid: int) -> str | None:
    """Return `namespace/pid/start in clock ticks` of a running process; None if there is none or no /proc.

    Process numbers are used again, their start times are not. A zombie counts as ended.
    """
    try:
        # The name, in parentheses, may hold anything: fields are counted after the last parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return None
    state, start_ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{_identify_pid_namespace()}/{pid}/{start_ticks}"


@cache
def _identify_pid_namespace() -> str:
    """Return the inode of this process's pid namespace as text; empty where there is none."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""
