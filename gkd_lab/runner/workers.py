"""`--workers N`: N processes of one run that share its packs, the processor cores and the GPUs.

They coordinate through the locks in the outputs folder alone, so that the others finish the cells of a killed
worker.
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
from gkd_lab.runner.devices import assign_gpu, count_workers_on_gpu, get_visibility_variable
from gkd_lab.store import Record, Store

PrintLine = Callable[[str], None]

FAILURE_PREFIX = "failed: "
"""Start of a line about a failed cell, which several workers may print."""


class WorkerPool:
    """Worker processes of one run; their output lines are printed with the worker's number in front."""

    def __init__(self, count: int, command: Sequence[str], say: PrintLine, gpus: Sequence[str] = ()) -> None:
        """Start `count` workers, each by `command` with `--worker K/N` appended.

        gpus: names of the GPUs that the workers get, round robin; `--worker K/N/G` says how many share one.
        """
        self.say, self.failures = say, dict[str, None]()
        self._processes = [_start_worker(command, number, count, gpus) for number in range(1, count + 1)]
        self._readers = [
            threading.Thread(target=self._relay_output, args=pair) for pair in self._enumerate_streams()
        ]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """Wait for all workers; return the largest exit status, or 128 plus the first signal received here.

        A killed worker counts as exit status 1.
        """
        with self._forward_signals() as received_signals:
            codes = [process.wait() for process in self._processes]
        for reader in self._readers:
            reader.join()
        for number, code in enumerate(codes, 1):
            if code < 0:
                self.say(f"[{number}] was killed by {signal.Signals(-code).name}")
        if received_signals:
            return 128 + received_signals[0]
        return max(1 if code < 0 else code for code in codes)

    def _enumerate_streams(self) -> Iterator[tuple[int, IO[str]]]:
        """Yield (number from 1, standard error stream) of each worker."""
        for number, process in enumerate(self._processes, 1):
            assert process.stderr is not None
            yield number, process.stderr

    def _relay_output(self, number: int, lines: IO[str]) -> None:
        """Print a worker's lines with its number; add lines of failures to `failures` instead, each once."""
        for line in lines:
            text = line.rstrip("\n")
            if text.startswith(FAILURE_PREFIX):
                self.failures[text] = None
            elif text:
                self.say(f"[{number}] {text}")

    @contextmanager
    def _forward_signals(self) -> Iterator[list[int]]:
        """In the block, forward SIGINT and SIGTERM to all workers; yield a list that receives the signals."""
        received_signals: list[int] = []

        def forward(number: int, _: object) -> None:
            """Handle a signal: add it to the list and send it to every worker."""
            received_signals.append(number)
            for process in self._processes:
                process.send_signal(number)

        numbers = (signal.SIGINT, signal.SIGTERM)
        previous_handlers = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield received_signals
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)


def clear_failures(grid: Grid, store: Store) -> None:
    """Delete the failed status of every reference, cell, evaluation, teacher text and scores of the grid.

    Once, before the workers start: no worker retries what another has just tried. Locked records keep theirs.
    """
    for role, model, cells in list_references(grid.cells):
        _clear_record_failures(store.get_artifact(grid.scale, role, model), cells)
    for cell in grid.cells:
        _clear_record_failures(store.get_record(cell), [cell])
        if cell.training.text_spec is not None:
            _clear_record_failures(store.get_teacher_text(grid.scale, cell.training.text_spec), [])
        if cell.training.scores_spec is not None:
            _clear_record_failures(store.get_teacher_scores(grid.scale, cell.training.scores_spec), [])


def _clear_record_failures(record: Record, cells: Sequence[Cell]) -> None:
    """Delete failed statuses of a record and its evaluations by `cells`; none if another process locks it."""
    parts = [record.get_evaluation(evaluation) for cell in cells for evaluation in cell.evaluations]
    if any(part.read_status().get("state") == "failed" for part in (record, *parts)):
        with suppress(Timeout), record.lock().acquire(timeout=0.2):
            for part in (record, *parts):
                part.clear_failure()


def count_worker_threads(workers: int) -> int:
    """Return the threads of each worker: cores divided by workers, at least 1 and at most OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variable = os.environ.get("OMP_NUM_THREADS", "")
    max_threads = int(variable) if variable.isdecimal() and int(variable) > 0 else cores
    return min(max(1, cores // workers), max_threads)


def _start_worker(
    command: Sequence[str], number: int, count: int, gpus: Sequence[str]
) -> "subprocess.Popen[str]":
    """Start and return process `number` of `count`, in its own session; its standard error is a pipe.

    In its own session, Ctrl-C reaches it once, through its parent. It sees one of the GPUs, if there are any.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(count_worker_threads(count))}
    share = f"{number}/{count}"
    if gpus:
        environment[get_visibility_variable(os.environ)] = assign_gpu(number, gpus)
        share += f"/{count_workers_on_gpu(number, count, gpus)}"
    return subprocess.Popen(
        [*command, "--worker", share],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )


def stop_with_parent() -> None:
    """Start a thread that sends SIGTERM to this worker when its parent ends, which closes standard input."""

    def watch() -> None:
        """Wait until standard input ends, then send SIGTERM to this process."""
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
