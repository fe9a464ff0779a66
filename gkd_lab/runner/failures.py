"""Separate failures of a cell, which its record stores, from errors of the machine, which stop the run."""

import errno
import shutil
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd_lab.config.library_errors import format_error
from gkd_lab.store import RecordPart

INFRASTRUCTURE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM),
}
"""Errors of the machine. Other OSErrors count as failures: libraries raise them for a missing checkpoint."""

MIN_FREE_BYTES = 8 << 20
"""Bytes below which a file system counts as full."""


class RecordedFailure(RuntimeError):
    """A part failed and its record stores the error; the run goes on with other parts."""


@contextmanager
def record_failures(parts: Iterable[RecordPart], outputs: Path) -> Iterator[None]:
    """On an error in the block, mark the parts without a status as failed, and raise RecordedFailure.

    A full disk or another error of the machine fails no part: it is raised as an OSError, and the parts stay
    unfinished. Because libraries raise errors of their own for a full disk, the free space is measured.
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
                part.mark_failed(format_error(error), traceback.format_exc())
        raise RecordedFailure(format_error(error)) from error
