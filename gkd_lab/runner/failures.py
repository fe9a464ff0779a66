"""What is kept of an error, and which errors are not a cell's own fault."""

import errno
import shutil
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd_lab.store import RecordPart

INFRASTRUCTURE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM),
}
"""What the system says of itself; libraries use OSError for a checkpoint that is not there, too."""

MIN_FREE_BYTES = 8 << 20
"""Bytes below which a file system counts as full."""


@contextmanager
def record_failures(parts: Iterable[RecordPart], outputs: Path) -> Iterator[None]:
    """An error inside becomes the failure of each part that has no verdict yet, and is raised again.

    A full disk or another fault of the machine is nobody's failure: it is raised as an OSError, and what
    was under way is still to be done. Libraries raise errors of their own for it, so space is measured.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in INFRASTRUCTURE_ERRNOS:
            raise
        if shutil.disk_usage(outputs).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device", str(outputs)) from error
        for part in parts:
            if not part.read_status():
                part.mark_failed(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise RecordedFailure(f"{type(error).__name__}: {error}") from error


class RecordedFailure(RuntimeError):
    """Something failed and its record says why; others go on."""
