"""Hashes of the content of files; a hash is cached by path, size and time, so that a file is read once.

A read that takes long is announced.
"""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

LONG_BYTES = 500_000_000
"""Bytes that take about a second to hash."""

logger = logging.getLogger(__name__)


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(place: Path, files: Iterable[Path], cached_hashes: dict[str, str]) -> dict[Path, str]:
    """Return file -> SHA-256 of its content, in the order of `files`, all of which are at `place`.

    cached_hashes: `PATH|SIZE|TIME` -> hash; those of files that had to be read are added.
    """
    keys = {file: _build_hash_key(file) for file in files}
    _announce_long_read(place, [file for file, key in keys.items() if key not in cached_hashes])
    for file, key in keys.items():
        if key not in cached_hashes:
            cached_hashes[key] = compute_sha256(file)
    return {file: cached_hashes[key] for file, key in keys.items()}


def _build_hash_key(path: Path) -> str:
    """Return path, size and time of a file, by which its hash is cached."""
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def _announce_long_read(place: Path, paths: Iterable[Path]) -> None:
    """Log a warning, which is shown on standard error, with the size of the files to read if it is large."""
    size = sum(path.stat().st_size for path in paths)
    if size >= LONG_BYTES:
        logger.warning("reading %s once for its fingerprint: %.1f GB", place, size / 1e9)
