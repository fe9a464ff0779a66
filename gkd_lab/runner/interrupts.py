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
SAID = b"\nstopping after this step, when its checkpoint is written; once more stops at once\n"


class Terminated(SystemExit):
    """SIGTERM came; the exit status is 143."""


_asked: int | None = None
_trainings = 0


@contextmanager
def signals_heard() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM Terminated; a training delays either by a step.

    For the main thread only, as Python's signals are.
    """
    global _asked
    before = {number: signal.signal(number, _hear) for number in SIGNALS}
    try:
        yield
    finally:
        _asked = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Around a training that looks at `is_asked` after each step: leaving the block stops the process."""
    global _trainings
    _trainings += 1
    try:
        yield
    finally:
        _trainings -= 1
    if _asked is not None:
        raise _reason(_asked)


def is_asked() -> bool:
    """Whether the training is to save now and stop.

    Raises OSError (ESTALE) where another machine has taken over a record: nothing may be written there.
    """
    taken = lock.lost()
    if taken is not None:
        why = f"this process was silent for {lock.STALE:.0f} s and another took over its work"
        raise OSError(errno.ESTALE, why, str(taken))
    return _asked is not None


def _hear(number: int, _: Any) -> None:
    global _asked
    first = _asked is None
    _asked = number
    if first and _trainings:
        # Not print, in the middle of which the signal may have come; the reader may be gone.
        with suppress(OSError):
            os.write(2, SAID)
        return
    for one in SIGNALS:
        signal.signal(one, signal.SIG_DFL)
    raise _reason(number)


def _reason(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)
