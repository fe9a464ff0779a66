"""`--workers N`: N processes of one run that claim its packs from each other, with the cores shared out.

They agree through the outputs folder alone, so that one that is killed is made up for by the others.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from filelock import Timeout

from gkd_lab.config import GridOfCells
from gkd_lab.config.cell import Cell, references
from gkd_lab.store import Record, Store

Say = Callable[[str], None]

FAILED = "failed: "
"""How a line begins that every worker would say of the same cell."""


class Workers:
    """The processes of one run; their lines come out with the number of the worker in front."""

    def __init__(self, count: int, command: Sequence[str], say: Say) -> None:
        """`command` starts worker K with `--worker K/N` at its end."""
        self.say, self.failed = say, dict[str, None]()
        self._processes = [_started(command, number, count) for number in range(1, count + 1)]
        self._readers = [threading.Thread(target=self._read, args=pair) for pair in self._numbered()]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """The worst exit status (2, 1, 0; 1 of one that was killed), or 128 and the signal that came here."""
        with self._forwarding() as heard:
            codes = [process.wait() for process in self._processes]
        for reader in self._readers:
            reader.join()
        for number, code in enumerate(codes, 1):
            if code < 0:
                self.say(f"[{number}] was killed by {signal.Signals(-code).name}")
        if heard:
            return 128 + heard[0]
        return max(1 if code < 0 else code for code in codes)

    def _numbered(self) -> Iterator[tuple[int, IO[str]]]:
        for number, process in enumerate(self._processes, 1):
            assert process.stderr is not None
            yield number, process.stderr

    def _read(self, number: int, lines: IO[str]) -> None:
        for line in lines:
            said = line.rstrip("\n")
            if said.startswith(FAILED):
                self.failed[said] = None
            elif said:
                self.say(f"[{number}] {said}")

    @contextmanager
    def _forwarding(self) -> Iterator[list[int]]:
        """SIGINT and SIGTERM go on to the workers, each time they come; yields those that came."""
        heard: list[int] = []

        def forward(number: int, _: object) -> None:
            heard.append(number)
            for process in self._processes:
                process.send_signal(number)

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield heard
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def forget_failures(grid: GridOfCells, store: Store) -> None:
    """Make what has failed undone, once for all workers: one must not try again what another just tried."""
    for one in references(grid.cells):
        _forget(store.artifact(grid.scale, one.role, one.model), one.cells)
    for cell in grid.cells:
        _forget(store.of(cell), [cell])
        if cell.training.text is not None:
            _forget(store.text(grid.scale, cell.training.text), [])
        if cell.training.scores is not None:
            _forget(store.scores(grid.scale, cell.training.scores), [])


def _forget(record: Record, cells: Sequence[Cell]) -> None:
    """Of a record that another process holds nothing: it is at work there."""
    parts = [record.evaluation(evaluation) for cell in cells for evaluation in cell.evaluations]
    if any(part.status().get("state") == "failed" for part in (record, *parts)):
        with suppress(Timeout), record.lock().acquire(timeout=0.2):
            for part in (record, *parts):
                part.forget_failure()


def threads_each(workers: int) -> int:
    """Cores of this process shared out, at least 1; fewer where OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(max(1, cores // workers), int(asked) if asked.isdecimal() and int(asked) > 0 else cores)


def _started(command: Sequence[str], number: int, count: int) -> "subprocess.Popen[str]":
    """In a session of its own: a terminal's Ctrl-C comes to it once, through its parent."""
    return subprocess.Popen(
        [*command, "--worker", f"{number}/{count}"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": str(threads_each(count))},
        start_new_session=True,
    )


def stop_with_parent() -> None:
    """In a worker: stop as if by SIGTERM when the parent is gone, which closes this process's input."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
