"""Ctrl-C, SIGTERM and SIGUSR1: a training finishes its step and saves first, other work stops at once.

A second signal stops a training at once, and a third has the system's default effect. In a job of a cluster
more signals change nothing: there a preemption sends several, to the script and to its children, and SIGUSR1
says that the time limit is near.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gkd_lab.store.heartbeat import require_locks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
JOB_SIGNALS = (*SIGNALS, signal.SIGUSR1)
STOP_MESSAGE = b"\nstopping after this step, when its checkpoint is written; once more stops at once\n"
JOB_STOP_MESSAGE = b"\nstopping after this step, when its checkpoint is written\n"


class Terminated(SystemExit):
    """SIGTERM or SIGUSR1 was received; the exit status is 143 or 138."""


_received_signal: int | None = None
_active_trainings = 0
_is_job = False


@contextmanager
def handle_signals(*, is_job: bool = False) -> Iterator[None]:
    """In the block, SIGINT raises KeyboardInterrupt and SIGTERM Terminated; old handlers return after it.

    Inside `delay_signals` a first signal is delayed. is_job: also handle SIGUSR1, like SIGTERM, and ignore
    all signals after the first. For the main thread only, as Python's signal handlers are.
    """
    global _received_signal, _is_job
    numbers = JOB_SIGNALS if is_job else SIGNALS
    previous_handlers = {number: signal.signal(number, _handle_signal) for number in numbers}
    _is_job = is_job
    try:
        yield
    finally:
        _received_signal, _is_job = None, False
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def delay_signals() -> Iterator[None]:
    """Delay a first signal: it is raised at the end of the block, a second one at once.

    A training inside polls `is_stop_requested`. Works only within `handle_signals`.
    """
    global _active_trainings
    _active_trainings += 1
    try:
        yield
    finally:
        _active_trainings -= 1
    if _received_signal is not None:
        raise _create_interrupt(_received_signal)


def is_stop_requested() -> bool:
    """Return whether a signal was received, so that the training must save now and stop.

    Raises LockLost where another process has taken the lock of a record, so that nothing is written.
    """
    require_locks()
    return _received_signal is not None


def _handle_signal(number: int, _: Any) -> None:
    """Handle a signal: store the first one in a training and return; raise every other at once.

    Before raising, the system's default handlers are restored; in a job, signals are ignored from then on.
    """
    global _received_signal
    is_first = _received_signal is None
    if _is_job and not is_first:
        return
    _received_signal = number
    if is_first and _active_trainings:
        # Not `print`, which the signal may have interrupted; standard error may be closed.
        with suppress(OSError):
            os.write(2, JOB_STOP_MESSAGE if _is_job else STOP_MESSAGE)
        return
    for signal_number in JOB_SIGNALS if _is_job else SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN if _is_job else signal.SIG_DFL)
    raise _create_interrupt(number)


def _create_interrupt(number: int) -> BaseException:
    """Return (not raise) KeyboardInterrupt for SIGINT, else Terminated with exit status 128 + `number`."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)
