"""Caches of facts read from finished records, in files below the outputs: for `gkd-lab status` and `table`.

`status.json` stays the source of truth: an entry is used only while the time, size and inode of the record's
files are unchanged, and the index can be deleted at any moment. Small stores have none.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gkd_lab.store.files import write_bytes

_INDEX_VERSION = 5
"""Raised when the cached facts change."""
_MIN_RECORDS = 500
"""Records below which reading them is as fast."""
_SETTLE_SECONDS = 2.0
"""Seconds for which a file must be unchanged before it is cached: two changes within a clock tick have the
same time, as git says of its own index (Documentation/technical/racy-git)."""

RecordFacts = dict[str, Any]
FileStamp = list[int] | None
"""Time in nanoseconds, size and inode of a file; None where it is missing."""


class RecordIndex:
    """Index of one outputs folder; call `save` after the last record.

    `name` is that of its file in `.cache`; facts of different kinds need different names.
    """

    def __init__(self, root: Path, name: str = "records") -> None:
        self.root, self.path = str(root), root / ".cache" / f"{name}.json"
        self._layouts: list[list[str]]
        self._entries: dict[str, tuple[int, list[FileStamp], RecordFacts]]
        self._layouts, self._entries = _read_index_file(self.path) or ([], {})
        self._new_entries = 0

    def get_facts(
        self, folder: str, files: Sequence[str], read_facts: Callable[[], RecordFacts]
    ) -> RecordFacts:
        """Return a record's cached facts; if one of `files` changed, call `read_facts` instead, and cache.

        A folder among `files` changes when an entry is added or removed.
        """
        record_path, names = f"{self.root}/{folder}", list(files)
        stamps = [_read_file_stamp(f"{record_path}/{name}") for name in names]
        entry = self._entries.get(folder)
        if entry is not None and entry[1] == stamps and self._layouts[entry[0]] == names:
            return entry[2]
        facts = read_facts()
        if stamps[0] is not None and _are_files_settled(stamps):
            if names not in self._layouts:
                self._layouts.append(names)
            self._entries[folder] = self._layouts.index(names), stamps, facts
            self._new_entries += 1
        return facts

    def save(self) -> None:
        """Write the index file if the store has 500 records and over 2 % are new entries; ignore OSError."""
        if len(self._entries) < _MIN_RECORDS or self._new_entries * 50 < len(self._entries):
            return
        # A store that is read-only or full is listed without an index.
        with suppress(OSError):
            write_bytes(self.path, _encode_index(self._layouts, self._entries))
            self._new_entries = 0


def _encode_index(layouts: Sequence[Any], entries: Mapping[str, Any]) -> bytes:
    """Return the content of an index file: JSON that begins with its version and a hash of what follows."""
    facts = json.dumps({"layouts": layouts, "records": entries}).encode()[1:] + b"\n"
    return _build_header(facts) + facts


def _read_index_file(path: Path) -> tuple[Any, Any] | None:
    """Return (layouts, entries) of an index file; None if it is missing, unreadable, older or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_build_header(content[_HEADER_BYTES:])):
        return None
    stored = json.loads(content)
    return stored["layouts"], stored["records"]


def _build_header(facts: bytes) -> bytes:
    """Return the first `_HEADER_BYTES` of an index file with these facts."""
    return b'{"version": %d, "sha256": "%s", ' % (_INDEX_VERSION, hashlib.sha256(facts).hexdigest().encode())


_HEADER_BYTES = len(_build_header(b""))


def _read_file_stamp(path: str) -> FileStamp:
    """Return [time in ns, size, inode] of a file; None if it is missing."""
    try:
        file_status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [file_status.st_mtime_ns, file_status.st_size, file_status.st_ino]


def _are_files_settled(stamps: Sequence[FileStamp]) -> bool:
    """Return whether the newest file has been unchanged for over `_SETTLE_SECONDS`."""
    newest = max(stamp[0] for stamp in stamps if stamp is not None)
    return time.time() - newest / 1e9 > _SETTLE_SECONDS
