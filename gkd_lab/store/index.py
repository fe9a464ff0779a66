"""What was read of finished records, kept beside them in one file, and used while their files are the same.

`status.json` stays the truth: a file counts as the same by its time, size and inode, and the index can be
deleted at any moment. Small stores have none.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gkd_lab.store.files import read_json, write_text

_INDEX_VERSION = 2
"""Raised when what is kept of a record changes."""
_MIN_RECORDS = 500
"""Records below which reading them is as fast."""
_SETTLE_SECONDS = 2.0
"""Seconds for which a file must have been as it is: two changes within a clock tick have one time, as git
says of its own index (Documentation/technical/racy-git)."""

RecordFacts = dict[str, Any]
FileStamp = list[int] | None


class RecordIndex:
    """The index of one outputs folder; `save` it when all was asked."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = str(root), root / ".cache" / "records.json"
        stored = read_json(self.path) or {}
        same = stored.get("version") == _INDEX_VERSION
        self._layouts: list[list[str]] = stored["layouts"] if same else []
        self._entries: dict[str, tuple[int, list[FileStamp], RecordFacts]] = stored["records"] if same else {}
        self._new_entries = 0

    def get_facts(
        self, folder: str, files: Sequence[str], read_facts: Callable[[], RecordFacts]
    ) -> RecordFacts:
        """What `read` returns of the record in `folder`, which it makes of nothing but these `files`."""
        place, names = f"{self.root}/{folder}", list(files)
        stamps = [_read_file_stamp(f"{place}/{name}") for name in names]
        kept = self._entries.get(folder)
        if kept is not None and kept[1] == stamps and self._layouts[kept[0]] == names:
            return kept[2]
        found = read_facts()
        if stamps[0] is not None and _are_files_settled(stamps):
            if names not in self._layouts:
                self._layouts.append(names)
            self._entries[folder] = self._layouts.index(names), stamps, found
            self._new_entries += 1
        return found

    def save(self) -> None:
        """Write it where that is worth the time: to a large store, when more than a fiftieth is new."""
        if len(self._entries) < _MIN_RECORDS or self._new_entries * 50 < len(self._entries):
            return
        # A store that can only be read, or is full, is listed without.
        with suppress(OSError):
            content = {"version": _INDEX_VERSION, "layouts": self._layouts, "records": self._entries}
            write_text(self.path, json.dumps(content) + "\n")
            self._new_entries = 0


def _read_file_stamp(path: str) -> FileStamp:
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [about.st_mtime_ns, about.st_size, about.st_ino]


def _are_files_settled(stamps: Sequence[FileStamp]) -> bool:
    newest = max(stamp[0] for stamp in stamps if stamp is not None)
    return time.time() - newest / 1e9 > _SETTLE_SECONDS
