"""End a command: print a message to standard error and exit with a status."""

import sys
from typing import NoReturn

SIGNAL_EXIT_BASE = 128
"""Exit status of a process that a signal stopped: this plus the number of the signal."""


def exit_with_message(message: str, status: int) -> NoReturn:
    """Print `gkd-lab: message` to stderr and exit with this status; never returns."""
    print(f"gkd-lab: {message}", file=sys.stderr)
    sys.exit(status)


def exit_for_error(error: Exception) -> NoReturn:
    """Exit with the message of an error that a user can meet: 2 for a request, 1 for files; else raise it."""
    # Loaded late: the list of commands and its completion need neither.
    from gkd_lab.config import ConfigError
    from gkd_lab.store import DamagedRecord

    if isinstance(error, ConfigError):
        exit_with_message(str(error), 2)
    if isinstance(error, DamagedRecord | OSError):
        exit_with_message(str(error), 1)
    raise error
