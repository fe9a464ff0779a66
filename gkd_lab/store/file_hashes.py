"""SHA-256 of every file that a finished training left: what `verify` holds it to."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from gkd_lab.store.files import read_json, write_json

FILE = "files.json"
_KEPT = ("spec.json", "provenance.json", "metrics.jsonl", "texts.jsonl")
"""Files that nothing changes after the training; those of a checkpoint and of a teacher's scores all are."""


def write_digests(folder: Path) -> None:
    """Hash the files of a record that is about to be done."""
    found = {path.relative_to(folder).as_posix(): digest(path) for path in _files(folder)}
    write_json(folder / FILE, found)


def stored_digests(folder: Path) -> dict[str, str] | None:
    """Relative name -> SHA-256 as it was at the end; None where none were written."""
    return read_json(folder / FILE)


def changed_files(folder: Path) -> list[str]:
    """What differs from what was written: a file that is gone, changed, or new in the checkpoint."""
    stored = stored_digests(folder) or {}
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    found = []
    for name in sorted({*stored, *there}):
        if name not in there:
            found.append(f"{name} is missing")
        elif name not in stored:
            found.append(f"{name} was added later")
        elif (now := digest(there[name])) != stored[name]:
            found.append(f"{name} has changed: SHA-256 {now[:8]} now, {stored[name][:8]} when it was written")
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in _KEPT if (folder / name).is_file())
    for kept in ("checkpoint", "scores"):
        yield from sorted(path for path in folder.glob(f"{kept}/**/*") if path.is_file())
