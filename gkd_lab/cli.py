"""The command line: parse, call, print. torch is loaded by `run` and `cell` only, when they start to work.

Exit status: 0 all is done; 1 something failed, named, with where its log is; 2 the request is wrong.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gkd_lab import __version__, experiments
from gkd_lab.records import DamagedRecord, Store
from gkd_lab.spec import GridOfCells, SpecError
from gkd_lab.spec.packs import PackLimit, parse_limit

if TYPE_CHECKING:
    from gkd_lab.results.overview import Overview

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Grids of generalized knowledge distillation: from an experiment file to a figure.",
)


class ScaleName(StrEnum):
    """Choices of --scale."""

    nano = "nano"
    smol = "smol"
    paper = "paper"


class TableFormat(StrEnum):
    """Choices of --format."""

    md = "md"
    csv = "csv"
    json = "json"
    parquet = "parquet"


Name = Annotated[str, typer.Argument(metavar="EXP", help="A name in experiments/, or a YAML file.")]
Scale = Annotated[ScaleName | None, typer.Option(help="Default: the experiment's own.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=V1,V2", help="Replace an axis or a field; repeatable."),
]
Outputs = Annotated[
    Path, typer.Option(envvar="GKD_LAB_OUTPUTS", help="Folder of all records.")
]
Pack = Annotated[str, typer.Option(help="auto, off, or the most cells that share one model.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Try failed cells again.")]
Executor = Annotated[str, typer.Option(help="local; ray and slurm are not built yet.")]
Workers = Annotated[int, typer.Option(help="Processes; 1 until more are built.")]


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Grids of generalized knowledge distillation: from an experiment file to a figure."""
    if show:
        print(__version__)
        raise typer.Exit()


@app.command("list")
def list_experiments() -> None:
    """Name every experiment with its number of cells and its question."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("experiment", "cells", "figures", "question"):
        table.add_column(column, overflow="fold", justify="right" if column == "cells" else "left")
    for name in experiments.names():
        grid = experiments.load(name, outputs=Path(tempfile.gettempdir()))
        figures = ", ".join(grid.experiment.paper.figures)
        question = grid.experiment.description.split(". ")[0]
        table.add_row(name, str(len(grid.cells)), figures, question)
    Console().print(table)


@app.command()
def plan(
    name: Name,
    scale: Scale = None,
    sets: Sets = None,
    outputs: Outputs = Path("outputs"),
    pack: Pack = "auto",
) -> None:
    """Show every cell with its status and cost; run nothing."""
    from gkd_lab.results.overview import overview

    limit = parse_limit(pack)
    grid = _grid(name, scale, sets, outputs)
    found = overview(grid, Store(outputs), limit)
    _print_cells(grid, found, progress=False)
    _print_summary(grid, found, limit)


@app.command()
def status(
    name: Name, scale: Scale = None, sets: Sets = None, outputs: Outputs = Path("outputs")
) -> None:
    """Show how far every cell is."""
    from gkd_lab.results.overview import overview

    grid = _grid(name, scale, sets, outputs)
    found = overview(grid, Store(outputs), "auto")
    _print_cells(grid, found, progress=True)
    for view in found.cells:
        if view.error:
            print(f"failed: {view.cell.folder}: {view.error.splitlines()[-1]}")
    if any(view.state == "failed" for view in found.cells):
        raise typer.Exit(1)


@app.command()
def run(
    name: Name,
    scale: Scale = None,
    sets: Sets = None,
    outputs: Outputs = Path("outputs"),
    pack: Pack = "auto",
    retry_failed: Retry = False,
    workers: Workers = 1,
    executor: Executor = "local",
) -> None:
    """Train and evaluate every cell; what is done is not done again."""
    _check_executor(executor, workers)
    limit = parse_limit(pack)
    _run(_grid(name, scale, sets, outputs), outputs, limit, retry_failed)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def cell(
    context: typer.Context,
    experiment: Annotated[
        str | None, typer.Option(metavar="EXP", help="Base, scale and evaluations come from here.")
    ] = None,
    scale: Scale = None,
    outputs: Outputs = Path("outputs"),
    retry_failed: Retry = False,
) -> None:
    """Run one cell: `--task arithmetic --lmbda 0.5 --beta 0.1 --seed 0 ...`, as a sweep agent calls it."""
    fields = _fields(context.args)
    grid = experiments.load_one(
        fields, name=experiment, scale=_value(scale), outputs=_writable(outputs)
    )
    _run(grid, outputs, "off", retry_failed)
    print(Store(outputs).of(grid.cells[0]).folder)


@app.command()
def table(
    name: Name,
    scale: Scale = None,
    sets: Sets = None,
    outputs: Outputs = Path("outputs"),
    format: Annotated[TableFormat, typer.Option(help="Of what is written.")] = TableFormat.md,
    output: Annotated[Path | None, typer.Option("-o", help="A file; default: stdout.")] = None,
) -> None:
    """Write one row per cell and reference model, with status and scores."""
    from gkd_lab.results.table import encode
    from gkd_lab.results.table import table as read_table

    grid = _grid(name, scale, sets, outputs)
    content = encode(read_table(grid, Store(outputs)), format.value)
    if output is None:
        sys.stdout.buffer.write(content)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(content)


@app.command()
def report(
    name: Name,
    scale: Scale = None,
    sets: Sets = None,
    outputs: Outputs = Path("outputs"),
    output: Annotated[Path | None, typer.Option("-o", help="Default: in the outputs.")] = None,
) -> None:
    """Write one self-contained HTML page: heat map, curves, table, samples."""
    from gkd_lab.results.report import write_report

    grid = _grid(name, scale, sets, outputs)
    place = output or outputs / "reports" / f"{grid.name}-{grid.scale}.html"
    print(f"report: {write_report(grid, Store(outputs), place).resolve()}")


def _run(grid: GridOfCells, outputs: Path, limit: PackLimit, retry_failed: bool) -> None:
    store = Store(_writable(outputs))
    if not retry_failed and _all_done(grid, store):
        print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)
        return
    from gkd_lab.runs.options import RunOptions
    from gkd_lab.runs.quiet import quieten
    from gkd_lab.runs.run import run as run_grid

    quieten()
    outcome = run_grid(grid, RunOptions(outputs, pack=limit, retry_failed=retry_failed))
    for line in outcome.failed:
        print(f"failed: {line}", file=sys.stderr)
    if outcome.elsewhere:
        print(f"{outcome.elsewhere} cells are being run by another process", file=sys.stderr)
    if outcome.failed or outcome.elsewhere:
        raise typer.Exit(1)
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def _all_done(grid: GridOfCells, store: Store) -> bool:
    from gkd_lab.results.rows import rows

    return all(row["status"] == "done" for row in rows(grid, store))


def _grid(name: str, scale: ScaleName | None, sets: Sequence[str] | None, outputs: Path) -> GridOfCells:
    overrides: dict[str, str] = {}
    for text in sets or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {text!r}: expected KEY=VALUE or KEY=V1,V2")
        overrides[key.strip()] = value
    return experiments.load(name, scale=_value(scale), overrides=overrides, outputs=outputs)


def _value(scale: ScaleName | None) -> Any:
    return None if scale is None else scale.value


def _fields(arguments: Sequence[str]) -> dict[str, str]:
    """`--lmbda 0.5` and `--lmbda=0.5` as fields of a cell."""
    fields: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise SpecError(f"unexpected {option!r}: fields of a cell are given as --FIELD VALUE")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not rest:
                raise SpecError(f"{option} has no value")
            value = rest.pop(0)
        fields[key] = value
    return fields


def _check_executor(executor: str, workers: int) -> None:
    if executor in ("ray", "slurm"):
        raise SpecError(f"--executor {executor} is not built yet; valid: local")
    if executor != "local":
        raise SpecError(f"unknown executor {executor!r}; valid: local")
    if workers != 1:
        raise SpecError(f"--workers {workers} is not built yet; valid: 1")


def _writable(outputs: Path) -> Path:
    """The outputs folder, made and tried. Raises SpecError when nothing can be written there."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outputs) as file:
            file.write(b".")
    except OSError as error:
        raise SpecError(
            f"--outputs {str(outputs)!r}: cannot write there: {error.strerror or error}; "
            "choose another folder with --outputs or GKD_LAB_OUTPUTS"
        ) from error
    return outputs


def _print_cells(grid: GridOfCells, found: "Overview", progress: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    axes = [axis for axis in grid.axes if axis not in ("task", "lmbda", "beta", "seed")]
    shown = ["cell", "task", "lmbda", "beta", "seed", *axes, "status"]
    more = ["step", "loss", "on policy"] if progress else ["pack", "alone, about"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (*shown, *more):
        table.add_column(column, justify="left" if column in ("cell", "task", "status") else "right")
    for view in found.cells:
        one = view.cell
        values = [one.fingerprint, one.task, f"{one.lmbda:g}", f"{one.beta:g}", str(one.seed)]
        values += [str(one.labels[axis]) for axis in axes]
        style = {"done": "green", "failed": "red", "running": "yellow"}.get(view.state, "")
        values.append(f"[{style}]{view.state}[/]" if style else view.state)
        if progress:
            values += [f"{view.step}/{one.training.steps}", _number(view.loss), _share(view.on_policy)]
        else:
            values += [str(view.pack), _about(view.seconds)]
        table.add_row(*values)
    Console().print(table)


def _print_summary(grid: GridOfCells, found: "Overview", limit: PackLimit) -> None:
    for role, name, state, seconds in found.artifacts:
        print(f"{role} {name}: {state}, about {_about(seconds)}")
    done = sum(view.state == "done" for view in found.cells)
    sizes = ", ".join(str(size) for size in found.packs[:12])
    print(f"{len(found.cells)} cells, {done} done, in {len(found.packs)} packs (of {sizes})")
    print(f"left to do, each cell alone: about {_about(found.seconds_left)}; packs take less")
    for line in (*found.collapsed, *found.notes):
        print(line)


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `gkd-lab`: exits with 0, 1 or 2; a traceback only for a bug of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(args=None if arguments is None else list(arguments))
    except SpecError as error:
        _leave(str(error), 2)
    except DamagedRecord as error:
        _leave(str(error), 1)
    except OSError as error:
        _leave(f"{error}; what was finished is kept, run again to go on", 1)
    except KeyboardInterrupt:
        _leave("interrupted; run again to go on from the last checkpoint", 130)


def _leave(message: str, status: int) -> None:
    print(f"gkd-lab: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
