"""Run stub cells (no torch) until none is left, on a made-up host and without file locks.

    python stub_worker.py HOST FOLDER [CELL_TO_DIE_IN]

A stub cell is a record: running it appends a line to `runs.jsonl` and marks it done.
"""

import errno
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

HOST, FOLDER, *CELLS_TO_DIE_IN = sys.argv[1:]


def refuse_to_lock(*_: object) -> NoReturn:
    raise OSError(errno.ENOSYS, "Function not implemented")


socket.gethostname = lambda: HOST
fcntl.flock = refuse_to_lock

from filelock import Timeout  # noqa: E402

from gkd_lab.store import Record  # noqa: E402
from gkd_lab.store.files import append_json_line  # noqa: E402

assert "torch" not in sys.modules


def run_cell(record: Record) -> None:
    """Do the work of a stub cell, unless it is done."""
    if record.read_status():
        return
    append_json_line(record.folder / "runs.jsonl", {"host": HOST, "pid": os.getpid()})
    if record.folder.name in CELLS_TO_DIE_IN:
        os.kill(os.getpid(), signal.SIGKILL)
    record.mark_done(host=HOST)


unfinished = [Record(folder) for folder in sorted(Path(FOLDER).iterdir())]
while unfinished:
    for record in unfinished:
        try:
            with record.lock().acquire(timeout=0):
                run_cell(record)
        except Timeout:
            continue
    unfinished = [record for record in unfinished if not record.read_status()]
    time.sleep(0.02)
