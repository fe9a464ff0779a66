"""Entry point of `gkd-lab`: the table of commands, and exit status 0, 1 or 2 without a traceback.

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
from gkd_lab.cli import commands, run_commands, user_commands
from gkd_lab.cli.options import exit_with_message
from gkd_lab.cli.run_commands import SIGNAL_EXIT_BASE
from gkd_lab.cli.text_streams import accept_any_text, restart_in_utf8_mode
from gkd_lab.config import ConfigError
from gkd_lab.store import DamagedRecord

_DESCRIPTION = "Grids of generalized knowledge distillation: from an experiment file to a figure."
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=_DESCRIPTION,
)
app.command("list", short_help="Name the experiments and their questions.")(commands.list_experiments)
app.command("plan", short_help="Show each cell with its status and cost; run nothing.")(commands.show_plan)
app.command("status", short_help="Show how far each cell is, and why it failed.")(commands.show_status)
app.command("run", short_help="Train and evaluate the cells of an experiment.")(run_commands.run_experiment)
app.command(
    "cell",
    short_help="Train and evaluate one cell, as a sweep agent asks.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(run_commands.run_cell)
app.command("sweep", short_help="Print the sweep file for wandb agents.")(commands.print_sweep_file)
app.command("table", short_help="Write the table of scores: csv, json, md, parquet.")(commands.write_table)
app.command("evaluate", short_help="Run lm-eval's tasks on a finished cell.")(run_commands.evaluate_cell)
app.command("export", short_help="Write a cell's student, or its adapter, to a folder.")(
    run_commands.export_cell
)
app.command("claims", short_help="Judge the paper's claims on a run.")(commands.judge_claims)
app.command("report", short_help="Write one HTML page with figures and scores.")(commands.write_report_page)
app.command("compare", short_help="Compare two cells, over the same examples.")(commands.compare_cells)
app.command("rescore", short_help="Compute metrics again from stored predictions.")(
    commands.rescore_experiment
)
app.command("verify", short_help="Check each record against its hashes.")(commands.verify_experiment)
app.command("selfcheck", short_help="Check the trainer's invariances on two models.")(
    run_commands.check_model_pair
)
app.command(
    "train",
    short_help="Distil one student of yours, with TRL's options.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(user_commands.train_student)
app.command("push", short_help="Push a cell's student and its card to the hub.")(user_commands.push_cell)


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
    # A home folder that cannot be written costs matplotlib its cache, and a user two lines per command.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(args=words, prog_name="gkd-lab", standalone_mode=False)
    except ConfigError as error:
        exit_with_message(str(error), 2)
    except _UsageError as error:
        exit_with_message(_format_usage_error(error), 2)
    except (DamagedRecord, OSError) as error:
        exit_with_message(str(error), 1)
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
