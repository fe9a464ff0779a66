"""The command `figures`: write an experiment's figures as files for a paper. No torch."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gkd_lab.cli.options import (
    ExperimentArgument,
    OutputsOption,
    ScaleOption,
    SetOption,
    format_grid_options,
    load_grid,
    pause_garbage_collection,
)
from gkd_lab.config import ConfigError
from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.store import Store
from gkd_lab.store.output_folders import create_writable_folder

if TYPE_CHECKING:
    from gkd_lab.figures.figure_files import FigureFormat

WIDTHS = (2.5, 20.0)
"""Inches between which a page may be wide."""


def write_figure_files(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    output: Annotated[
        Path | None,
        typer.Option("-o", metavar="DIR", help="Folder to write; default: in the outputs folder."),
    ] = None,
    format: Annotated[str, typer.Option(metavar="F1,F2", help="Formats, of pdf, svg and png.")] = "pdf",
    width: Annotated[
        float | None,
        typer.Option(metavar="INCHES", help="Width of each page: 3.25 for a column, 5.5 for a text."),
    ] = None,
    with_paper: Annotated[
        bool, typer.Option("--paper", help="Draw the paper's maps beside; default: if EXP has `paper:`.")
    ] = False,
) -> None:
    """Write every figure of the report that has data as a file, and print the paths.

    Without -o they go to outputs/figures/NAME-SCALE-FINGERPRINT. Missing cells are drawn as such, and named.
    """
    formats = parse_figure_formats(format)
    if width is not None and not WIDTHS[0] <= width <= WIDTHS[1]:
        raise ConfigError(f"--width {width:g}: expected inches from {WIDTHS[0]:g} to {WIDTHS[1]:g}, as 3.25")
    check_output_folder(output)
    from gkd_lab.figures.figure_files import write_grid_figures
    from gkd_lab.figures.grid_figures import aggregate_tasks, collect_task_scores, draw_grid_figures
    from gkd_lab.report.summary_text import describe_missing_cells
    from gkd_lab.tables.long_table import build_long_table

    with pause_garbage_collection():
        grid, store = load_grid(name, scale, sets, outputs), Store(outputs)
        table = build_long_table(grid, store)
        with_paper = with_paper or grid.experiment.names_paper
        tasks = collect_task_scores(grid, store, table, with_paper=with_paper)
    folder = output or outputs / "figures" / f"{grid.name}-{grid.scale}-{grid.fingerprint}"
    figures = [
        figure
        for figure in draw_grid_figures(grid, store, tasks, aggregate_tasks(table), width)
        if figure.has_data
    ]
    if not figures:
        command = format_command("run", name, scale, sets, outputs)
        print(f"gkd-lab: no cell of {grid.name} has a score to draw; first: {command}", file=sys.stderr)
        raise typer.Exit(1)
    create_writable_folder(folder, "-o", "choose another folder")
    for path in write_grid_figures(grid.name, figures, folder, formats):
        print(path)
    for line in describe_missing_cells([task.scores for task in tasks]):
        print(line, file=sys.stderr)


def parse_figure_formats(text: str) -> "tuple[FigureFormat, ...]":
    """Return the distinct formats of `pdf,svg,png`. Raises ConfigError for another name, or none."""
    from gkd_lab.figures.figure_files import FIGURE_FORMATS

    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    for name in names or [text]:
        if name not in FIGURE_FORMATS:
            raise build_unknown_name_error("format", name, FIGURE_FORMATS)
    return tuple(format for format in FIGURE_FORMATS if format in names)


def check_output_folder(output: Path | None) -> None:
    """Raise ConfigError if `-o` is a file, or in one; None is fine."""
    paths = [] if output is None else [output.absolute(), *output.absolute().parents]
    nearest = next((path for path in paths if path.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise ConfigError(f"-o {str(output)!r}: {str(nearest)!r} is a file; expected a folder")


def format_command(
    command: str, name: str, scale: str | None, sets: Sequence[str] | None, outputs: Path
) -> str:
    """Return a command line of `gkd-lab` for an experiment with the options that were given."""
    words = ["gkd-lab", command, name, *format_grid_options(scale, sets)]
    words += [] if outputs == Path("outputs") else ["--outputs", str(outputs)]
    return shlex.join(words)
