"""Say that files are read for their fingerprint, where they are so large that it takes time."""

import logging
from collections.abc import Iterable
from pathlib import Path

LONG_BYTES = 500_000_000
"""Bytes that take about a second to hash."""

logger = logging.getLogger(__name__)


def announce_long_read(place: Path, paths: Iterable[Path]) -> None:
    """Log a warning, which is shown on standard error, with the size of the files if they are large.

    paths: Those files below `place` whose hash is not known yet.
    """
    size = sum(path.stat().st_size for path in paths)
    if size >= LONG_BYTES:
        logger.warning("reading %s once for its fingerprint: %.1f GB", place, size / 1e9)
