"""SHA-256 of every file that a finished training left: what `verify` holds it to."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from gkd_lab.store.files import read_json, write_json

HASHES_FILE = "files.json"
_SEALED_FILES = ("spec.json", "provenance.json", "metrics.jsonl", "texts.jsonl")
"""Files that nothing changes after the training; those of a checkpoint and of a teacher's scores all are."""


def write_file_hashes(folder: Path) -> None:
    """Hash the files of a record that is about to be done."""
    found = {
        path.relative_to(folder).as_posix(): compute_sha256(path) for path in _iterate_sealed_files(folder)
    }
    write_json(folder / HASHES_FILE, found)


def read_file_hashes(folder: Path) -> dict[str, str] | None:
    """Relative name -> SHA-256 as it was at the end; None where none were written."""
    return read_json(folder / HASHES_FILE)


def list_changed_files(folder: Path) -> list[str]:
    """What differs from what was written: a file that is gone, changed, or new in the checkpoint."""
    stored = read_file_hashes(folder) or {}
    there = {path.relative_to(folder).as_posix(): path for path in _iterate_sealed_files(folder)}
    found = []
    for name in sorted({*stored, *there}):
        if name not in there:
            found.append(f"{name} is missing")
        elif name not in stored:
            found.append(f"{name} was added later")
        elif (now := compute_sha256(there[name])) != stored[name]:
            found.append(f"{name} has changed: SHA-256 {now[:8]} now, {stored[name][:8]} when it was written")
    return found


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _iterate_sealed_files(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in _SEALED_FILES if (folder / name).is_file())
    for kept in ("checkpoint", "scores"):
        yield from sorted(path for path in folder.glob(f"{kept}/**/*") if path.is_file())
