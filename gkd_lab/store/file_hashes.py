"""SHA-256 of every file that a finished training left, which `gkd-lab verify` compares with the files."""

from collections.abc import Iterator
from pathlib import Path

from gkd_lab.config.content_hashes import compute_sha256
from gkd_lab.store.files import read_json, write_json

HASHES_FILE = "files.json"
_SEALED_FILES = ("spec.json", "provenance.json", "metrics.jsonl", "texts.jsonl", "selection.jsonl")
"""Files that do not change after the training; nor does any file below `checkpoint/` and `scores/`."""


def write_file_hashes(folder: Path) -> None:
    """Write `files.json`, the SHA-256 of each file of a record that is about to be marked done."""
    hashes = {
        path.relative_to(folder).as_posix(): compute_sha256(path) for path in _iterate_sealed_files(folder)
    }
    write_json(folder / HASHES_FILE, hashes)


def read_file_hashes(folder: Path) -> dict[str, str] | None:
    """Return relative name -> SHA-256 as stored in `files.json`; None if the record has none."""
    return read_json(folder / HASHES_FILE)


def list_changed_files(folder: Path) -> list[str]:
    """Return a sentence for each file that is missing, added or changed since `files.json` was written."""
    hashes = read_file_hashes(folder) or {}
    paths = {path.relative_to(folder).as_posix(): path for path in _iterate_sealed_files(folder)}
    changes = []
    for name in sorted({*hashes, *paths}):
        if name not in paths:
            changes.append(f"{name} is missing")
        elif name not in hashes:
            changes.append(f"{name} was added later")
        elif (current_hash := compute_sha256(paths[name])) != hashes[name]:
            changes.append(
                f"{name} has changed: SHA-256 {current_hash[:8]} now, {hashes[name][:8]} when it was written"
            )
    return changes


def _iterate_sealed_files(folder: Path) -> Iterator[Path]:
    """Yield the existing files that must not change once a record is finished, checkpoint included."""
    yield from (folder / name for name in _SEALED_FILES if (folder / name).is_file())
    for subfolder in ("checkpoint", "checkpoint-best", "scores"):
        yield from sorted(path for path in folder.glob(f"{subfolder}/**/*") if path.is_file())
