"""Attempts: what a process was doing with the memory when it ended without a word.

Each record of a pack has an `attempt.json` while the pack is in memory. The kernel's out-of-memory killer
leaves a process no time to write anything; the next process finds the file, and with the kernel's count of
such kills it knows the reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gkd_lab.store.files import read_json, remove_file, write_json
from gkd_lab.store.heartbeat import LockLost
from gkd_lab.store.record import Record

_ATTEMPT_FILE = "attempt.json"
_KILLED = "killed_for_memory"


@contextmanager
def record_attempt(records: Sequence[Record], facts: Mapping[str, Any]) -> Iterator[None]:
    """Keep `attempt.json` with `facts` in each record during the block; the caller holds their locks.

    It is removed at the end, also after an error, except that of a lost lock.
    """
    for record in records:
        write_json(record.folder / _ATTEMPT_FILE, facts)
    try:
        yield
    except LockLost:
        raise
    except BaseException:
        remove_attempts(records)
        raise
    remove_attempts(records)


def read_attempt(record: Record) -> dict[str, Any] | None:
    """Return the facts that a killed process has left in a record; None without any."""
    return read_json(record.folder / _ATTEMPT_FILE)


def remove_attempts(records: Sequence[Record]) -> None:
    """Remove the attempts of these records; the caller holds their locks."""
    for record in records:
        remove_file(record.folder / _ATTEMPT_FILE)


def mark_killed_for_memory(record: Record) -> bool:
    """Note in a record's attempt that it was killed for lack of memory, as an engine knows of a job.

    The next process that works on the record then takes fewer cells. Returns whether it has an attempt.
    """
    facts = read_attempt(record)
    if facts is None:
        return False
    write_json(record.folder / _ATTEMPT_FILE, {**facts, _KILLED: True})
    return True


def is_marked_as_killed(attempt: Mapping[str, Any]) -> bool:
    """Return whether `mark_killed_for_memory` has marked an attempt."""
    return attempt.get(_KILLED) is True
