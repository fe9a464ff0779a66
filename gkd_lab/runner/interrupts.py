"""Ctrl-C and SIGTERM: a training finishes its step and saves first, other work stops at once.

A second signal stops a training at once, and a third has the system's default effect.
"""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gkd_lab.store import lock

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_MESSAGE = b"\nstopping after this step, when its checkpoint is written; once more stops at once\n"


class Terminated(SystemExit):
    """SIGTERM was received; the exit status is 143."""


_received_signal: int | None = None
_active_trainings = 0


@contextmanager
def handle_signals() -> Iterator[None]:
    """In the block, SIGINT raises KeyboardInterrupt and SIGTERM Terminated; old handlers return after it.

    Inside `delay_signals` a first signal is delayed. For the main thread only, as Python's signal handlers
    are.
    """
    global _received_signal
    previous_handlers = {number: signal.signal(number, _handle_signal) for number in SIGNALS}
    try:
        yield
    finally:
        _received_signal = None
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def delay_signals() -> Iterator[None]:
    """Delay a first SIGINT or SIGTERM: it is raised at the end of the block, a second one at once.

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
    """Return whether SIGINT or SIGTERM was received, so that the training must save now and stop.

    Raises OSError (ESTALE) where another machine has taken the lock of a record, so that nothing is written.
    """
    lost_folder = lock.find_lost_folder()
    if lost_folder is not None:
        reason = f"this process was silent for {lock.STALE_SECONDS:.0f} s and another took over its work"
        raise OSError(errno.ESTALE, reason, str(lost_folder))
    return _received_signal is not None


def _handle_signal(number: int, _: Any) -> None:
    """Handle SIGINT or SIGTERM: store the first one in a training and return; raise every other at once.

    Before raising, the system's default handlers are restored.
    """
    global _received_signal
    is_first = _received_signal is None
    _received_signal = number
    if is_first and _active_trainings:
        # Not `print`, which the signal may have interrupted; standard error may be closed.
        with suppress(OSError):
            os.write(2, STOP_MESSAGE)
        return
    for signal_number in SIGNALS:
        signal.signal(signal_number, signal.SIG_DFL)
    raise _create_interrupt(number)


def _create_interrupt(number: int) -> BaseException:
    """Return (not raise) KeyboardInterrupt for SIGINT, else Terminated with exit status 128 + `number`."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)
