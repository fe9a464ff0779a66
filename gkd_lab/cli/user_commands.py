"""Commands for a user's own models: `train` distils one pair, `push` uploads a cell. torch is loaded late."""

import os
import sys
import warnings
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from gkd_lab.cli.exit_status import exit_with_message
from gkd_lab.cli.options import CellArgument, OutputsOption
from gkd_lab.config import ConfigError
from gkd_lab.store.output_folders import check_outputs_folder

HELP_OPTIONS = ("--help", "-h")


def train_student(context: typer.Context) -> None:
    """Distil one student of yours: options as `trl sft` takes them, in a YAML file and as flags."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        _train(context.args, is_main=is_main)
    except ConfigError:
        if is_main:
            raise
        raise typer.Exit(2) from None  # each process meets the same error, and one says so
    except KeyboardInterrupt:
        exit_with_message("interrupted; go on with --resume_from_checkpoint true", 130)


def _train(words: list[str], *, is_main: bool) -> None:
    """Print the help if asked for, else run the training; exit 1 if it stops with an error."""
    from gkd_lab.scripts.run_file import read_config, split_config_option

    if any(word in HELP_OPTIONS for word in words):
        print(resources.files("gkd_lab.scripts").joinpath("train_help.txt").read_text(), end="")
        return
    path, flags = split_config_option(words)
    config = {} if path is None else read_config(path)
    from gkd_lab.runner.progress import silence_libraries

    silence_libraries()
    if not is_main:
        warnings.simplefilter("ignore")
    from gkd_lab.scripts.train import TrainingFailed, run_training
    from gkd_lab.scripts.train_options import parse_request

    try:
        run_training(parse_request(path, config, flags))
    except TrainingFailed as error:
        if is_main:
            exit_with_message(str(error), 1)
        raise typer.Exit(1) from error


def push_cell(
    cell: CellArgument,
    repo: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Model on the hub; default: one of yours, named by task and cell."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create it as a private model.")] = False,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Push a finished cell's student, tokenizer and card with scores to the hub; print its address."""
    check_outputs_folder(outputs)
    from huggingface_hub.utils import disable_progress_bars

    from gkd_lab.scripts.push_record import push_record
    from gkd_lab.store.lookup import find_record

    if not sys.stderr.isatty():
        disable_progress_bars()
    print(push_record(find_record(cell, outputs), repo, private=private))
