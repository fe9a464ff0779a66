"""Ctrl-C and SIGTERM: a training finishes its step and saves first, anything else stops where it is.

A second signal stops a training at once too, and a third leaves it to the system.
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
    """SIGTERM came; the exit status is 143."""


_received_signal: int | None = None
_active_trainings = 0


@contextmanager
def handle_signals() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM Terminated; a training delays either by a step.

    For the main thread only, as Python's signals are.
    """
    global _received_signal
    before = {number: signal.signal(number, _handle_signal) for number in SIGNALS}
    try:
        yield
    finally:
        _received_signal = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def delay_signals() -> Iterator[None]:
    """Around a training that looks at `is_asked` after each step: leaving the block stops the process."""
    global _active_trainings
    _active_trainings += 1
    try:
        yield
    finally:
        _active_trainings -= 1
    if _received_signal is not None:
        raise _create_interrupt(_received_signal)


def is_stop_requested() -> bool:
    """Whether the training is to save now and stop.

    Raises OSError (ESTALE) where another machine has taken over a record: nothing may be written there.
    """
    taken = lock.find_lost_folder()
    if taken is not None:
        why = f"this process was silent for {lock.STALE_SECONDS:.0f} s and another took over its work"
        raise OSError(errno.ESTALE, why, str(taken))
    return _received_signal is not None


def _handle_signal(number: int, _: Any) -> None:
    global _received_signal
    first = _received_signal is None
    _received_signal = number
    if first and _active_trainings:
        # Not print, in the middle of which the signal may have come; the reader may be gone.
        with suppress(OSError):
            os.write(2, STOP_MESSAGE)
        return
    for one in SIGNALS:
        signal.signal(one, signal.SIG_DFL)
    raise _create_interrupt(number)


def _create_interrupt(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)
