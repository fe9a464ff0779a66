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

from gkd_lab.config import Grid
from gkd_lab.config.cell import Cell, list_references
from gkd_lab.store import Record, Store

PrintLine = Callable[[str], None]

FAILURE_PREFIX = "failed: "
"""How a line begins that every worker would say of the same cell."""


class WorkerPool:
    """The processes of one run; their lines come out with the number of the worker in front."""

    def __init__(self, count: int, command: Sequence[str], say: PrintLine) -> None:
        """`command` starts worker K with `--worker K/N` at its end."""
        self.say, self.failures = say, dict[str, None]()
        self._processes = [_start_worker(command, number, count) for number in range(1, count + 1)]
        self._readers = [
            threading.Thread(target=self._relay_output, args=pair) for pair in self._enumerate_streams()
        ]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """The worst exit status (2, 1, 0; 1 of one that was killed), or 128 and the signal that came here."""
        with self._forward_signals() as heard:
            codes = [process.wait() for process in self._processes]
        for reader in self._readers:
            reader.join()
        for number, code in enumerate(codes, 1):
            if code < 0:
                self.say(f"[{number}] was killed by {signal.Signals(-code).name}")
        if heard:
            return 128 + heard[0]
        return max(1 if code < 0 else code for code in codes)

    def _enumerate_streams(self) -> Iterator[tuple[int, IO[str]]]:
        for number, process in enumerate(self._processes, 1):
            assert process.stderr is not None
            yield number, process.stderr

    def _relay_output(self, number: int, lines: IO[str]) -> None:
        for line in lines:
            said = line.rstrip("\n")
            if said.startswith(FAILURE_PREFIX):
                self.failures[said] = None
            elif said:
                self.say(f"[{number}] {said}")

    @contextmanager
    def _forward_signals(self) -> Iterator[list[int]]:
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


def clear_failures(grid: Grid, store: Store) -> None:
    """Make what has failed undone, once for all workers: one must not try again what another just tried."""
    for one in list_references(grid.cells):
        _clear_record_failures(store.get_artifact(grid.scale, one.role, one.model), one.cells)
    for cell in grid.cells:
        _clear_record_failures(store.get_record(cell), [cell])
        if cell.training.text_spec is not None:
            _clear_record_failures(store.get_teacher_text(grid.scale, cell.training.text_spec), [])
        if cell.training.scores_spec is not None:
            _clear_record_failures(store.get_teacher_scores(grid.scale, cell.training.scores_spec), [])


def _clear_record_failures(record: Record, cells: Sequence[Cell]) -> None:
    """Of a record that another process holds nothing: it is at work there."""
    parts = [record.get_evaluation(evaluation) for cell in cells for evaluation in cell.evaluations]
    if any(part.read_status().get("state") == "failed" for part in (record, *parts)):
        with suppress(Timeout), record.lock().acquire(timeout=0.2):
            for part in (record, *parts):
                part.clear_failure()


def count_worker_threads(workers: int) -> int:
    """Cores of this process shared out, at least 1; fewer where OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(max(1, cores // workers), int(asked) if asked.isdecimal() and int(asked) > 0 else cores)


def _start_worker(command: Sequence[str], number: int, count: int) -> "subprocess.Popen[str]":
    """In a session of its own: a terminal's Ctrl-C comes to it once, through its parent."""
    return subprocess.Popen(
        [*command, "--worker", f"{number}/{count}"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": str(count_worker_threads(count))},
        start_new_session=True,
    )


def stop_with_parent() -> None:
    """In a worker: stop as if by SIGTERM when the parent is gone, which closes this process's input."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
