"""Entry point of `gkd-lab`: exit status 0, 1 or 2 without a traceback. The commands are in `command_table`.

Status 0: all is done; 1: something failed, and the message names it and its log; 2: the request is wrong.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gkd_lab import __version__
from gkd_lab.cli.command_table import CommandGroup
from gkd_lab.cli.completion import join_bash_words
from gkd_lab.cli.exit_status import SIGNAL_EXIT_BASE, exit_for_error, exit_with_message
from gkd_lab.cli.text_streams import accept_any_text, restart_in_utf8_mode

_DESCRIPTION = "Grids of generalized knowledge distillation: from an experiment file to a figure."
app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=_DESCRIPTION,
    epilog="gkd-lab COMMAND --help has the options of a command, and examples.",
)


@app.callback(invoke_without_command=True, help=_DESCRIPTION)
def print_version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version and exit if `--version` is given; else do nothing."""
    if show:
        print(__version__)
        raise typer.Exit()


_INTERRUPTED_MESSAGE = "interrupted; run again to go on from the last checkpoint"
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""UsageError of typer: unknown option or command, missing or invalid value."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status (0, 1, 2, or 128 + signal); expected errors print a message.

    arguments: None: those of the process. A traceback means a bug in this package.
    """
    if arguments is None:
        restart_in_utf8_mode()
    accept_any_text()
    join_bash_words(os.environ)
    # A home folder that cannot be written costs matplotlib its cache, and a user two lines per command.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when torch is loaded: threads that spin while they wait for each other take ten times as long where
    # another program uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(args=words, prog_name="gkd-lab", standalone_mode=False)
    except _UsageError as error:
        exit_with_message(_format_usage_error(error), 2)
    except Exception as error:
        exit_for_error(error)
    except KeyboardInterrupt:
        exit_with_message(_INTERRUPTED_MESSAGE, 130)
    except SystemExit as stop:
        if stop.code == SIGNAL_EXIT_BASE + signal.SIGTERM:
            exit_with_message(_INTERRUPTED_MESSAGE, stop.code)
        raise
    if status == 130:  # typer returns this after Ctrl-C
        exit_with_message(_INTERRUPTED_MESSAGE, 130)
    sys.exit(status or 0)


def _format_usage_error(error: Any) -> str:
    """Return typer's usage error as one line that ends with the `--help` command to read."""
    # pydantic, which checks typer's values, adds this prefix.
    text = error.format_message().replace("Value error, ", "").rstrip(".")
    command = error.ctx.command_path if error.ctx else "gkd-lab"
    return f"{text}; see `{command} --help`"
