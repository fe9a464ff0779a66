"""Options of the command line: types, choices and help texts, and functions that parse and check them."""

import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from gkd_lab import experiments
from gkd_lab.cli.completion import complete_cells, complete_experiments, complete_overrides
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.config.experiment import Scale
from gkd_lab.store.files import write_bytes
from gkd_lab.store.output_folders import check_outputs_folder

TableFormat = Literal["md", "csv", "json", "parquet"]
OutputFormat = Literal["text", "json"]
TrackerChoice = Literal["none", "wandb", "trackio"]
BusyCellAction = Literal["wait", "pass"]
"""Action for cells that another process works on."""

ExperimentArgument = Annotated[
    str,
    typer.Argument(
        metavar="EXP", help="Name in experiments/, or a YAML file.", autocompletion=complete_experiments
    ),
]
CELL_HELP = "Folder of a record, or the first digits of its fingerprint."
CellArgument = Annotated[str, typer.Argument(metavar="CELL", help=CELL_HELP, autocompletion=complete_cells)]
ScaleOption = Annotated[Scale | None, typer.Option(help="Default: the scale of the experiment.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=V1,V2",
        help="Replace an axis or a field; repeatable.",
        autocompletion=complete_overrides,
    ),
]
OutputsOption = Annotated[Path, typer.Option(envvar="GKD_LAB_OUTPUTS", help="Folder of the records.")]
PackOption = Annotated[
    str, typer.Option(help="auto, off, or the largest number of cells in one packed model.")
]
PowerOption = Annotated[
    bool, typer.Option("--power", help="Show which differences its claims could show, in place of cells.")
]
NoiseFromOption = Annotated[
    str | None,
    typer.Option(
        metavar="TABLE|EXP",
        help="With --power: noise of a parquet file, or of an experiment's cells or table. Default: of EXP.",
    ),
]
NoiseOption = Annotated[
    float | None,
    typer.Option(
        "--noise",
        metavar="SD",
        help="With --power: standard deviation in points of a score between seeds.",
    ),
]
ExampleNoiseOption = Annotated[
    float | None,
    typer.Option(
        "--example-noise",
        metavar="SD",
        help="With --power: that over examples, of the difference of two models at one example.",
    ),
]
RetryFailedOption = Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")]
TrackerOption = Annotated[
    TrackerChoice | None, typer.Option("--tracker", help="Default: wandb under a sweep agent, else none.")
]
EXECUTORS = ("local", "slurm", "ray")
ExecutorOption = Annotated[str, typer.Option(help="local, or a cluster's: slurm or ray (docs/clusters.md).")]
PartitionOption = Annotated[str | None, typer.Option(help="slurm: partition; default: the cluster's.")]
AccountOption = Annotated[str | None, typer.Option(help="slurm: account that pays.")]
GpusOption = Annotated[int, typer.Option(help="Cluster: GPUs of each job.")]
MemOption = Annotated[
    str | None, typer.Option(help="Cluster: memory of each job, as 4G; default: as planned.")
]
TimeOption = Annotated[
    str | None, typer.Option(help="slurm: time limit of each job, as 1:30:00; it saves and goes on.")
]
MaxJobsOption = Annotated[int | None, typer.Option(help="Cluster: largest number of jobs at once.")]
SbatchOption = Annotated[
    str | None, typer.Option(metavar="OPTIONS", help="slurm: more options of sbatch, as '--qos=long'.")
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Cluster: submit, and do not wait.")]
CancelOption = Annotated[bool, typer.Option("--cancel", help="Cluster: cancel the jobs of EXP.")]
StopWithParentOption = Annotated[
    bool, typer.Option("--stop-with-parent", hidden=True, help="Stop when standard input ends.")
]
PrintOption = Annotated[bool, typer.Option("--print", help="slurm: print the scripts; submit nothing.")]
WorkersOption = Annotated[
    int, typer.Option(help="Processes that share the packs of cells and the CPU cores.")
]
NoWaitOption = Annotated[
    bool, typer.Option("--no-wait", help="Do not wait for cells that other processes work on.")
]
TermGradientsOption = Annotated[
    bool,
    typer.Option(
        "--term-gradients",
        help="Log the gradient norm of each loss term; costs one backward pass per term and log line.",
    ),
]
WorkerOption = Annotated[
    str | None,
    typer.Option(hidden=True, metavar="K/N/G", help="Number K of this worker process of N; G share its GPU."),
]


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside the block: a large grid is millions of objects, and all of them are used."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def parse_metric_names(names: str | None) -> tuple[str, ...] | None:
    """Return the distinct metrics of `--metrics a,b`; None without the option. ConfigError: unknown name."""
    from gkd_lab.metrics import METRICS

    if names is None:
        return None
    metrics = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not metrics:
        raise ConfigError(f"--metrics {names!r} names no metric; expected names such as accuracy,rouge2")
    for metric in metrics:
        if metric not in METRICS:
            raise build_unknown_name_error("metric", metric, METRICS)
    return metrics


def load_grid_without_cache(
    name: str, scale: Scale | None, sets: Sequence[str] | None, outputs: Path
) -> Grid:
    """Return a grid after hashing local data and models anew; commits in `revisions.json` still apply."""
    revisions = outputs / "revisions.json"
    with tempfile.TemporaryDirectory() as folder:
        if revisions.is_file():
            write_bytes(Path(folder) / revisions.name, revisions.read_bytes())
        return load_grid(name, scale, sets, Path(folder))


def parse_worker_counts(text: str | None) -> tuple[int, int]:
    """Return (all workers, those on this worker's GPU) from `K/N/G`, `K/N` without GPUs, or None: 1, 1."""
    if text is None:
        return 1, 1
    _, count, *on_gpu = map(int, text.split("/"))
    return count, on_gpu[0] if on_gpu else count


def load_grid(
    name: str,
    scale: Scale | None,
    sets: Sequence[str] | None,
    outputs: Path,
    *,
    allow_missing_revisions: bool = False,
) -> Grid:
    """Return the grid of an experiment, by name or file, with `--set` texts applied. Raises ConfigError."""
    check_outputs_folder(outputs)
    return experiments.load(
        name,
        scale=scale,
        overrides=parse_overrides(sets),
        outputs=outputs,
        allow_missing_revisions=allow_missing_revisions,
    )


def parse_overrides(sets: Sequence[str] | None) -> dict[str, str]:
    """Return key -> value text from the KEY=VALUE texts of --set. ConfigError: no value, a key twice."""
    overrides: dict[str, str] = {}
    for text in sets or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text!r}: expected KEY=VALUE or KEY=V1,V2")
        key = key.strip()
        if key in overrides:
            values = f"{overrides[key]!r} and {value!r}"
            raise ConfigError(f"--set {key} is given twice, {values}; several values are written {key}=V1,V2")
        overrides[key] = value
    return overrides


def format_grid_options(scale: str | None, sets: Sequence[str] | None) -> list[str]:
    """Return the words of a command line that choose a grid of an experiment: `--scale` and each `--set`."""
    words = [] if scale is None else ["--scale", scale]
    for text in sets or ():
        words += ["--set", text]
    return words


def parse_cell_fields(arguments: Sequence[str]) -> dict[str, str]:
    """Return field -> value text from `--lmbda 0.5` or `--lmbda=0.5`. ConfigError: no value, given twice."""
    fields: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        option = remaining.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"unexpected {option!r}: fields of a cell are given as --FIELD VALUE")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"{option} has no value: fields of a cell are given as --FIELD VALUE")
            value = remaining.pop(0)
        if not key:
            raise ConfigError(f"{option!r} names no field: they are given as --FIELD VALUE")
        if key in fields:
            raise ConfigError(f"--{key} is given twice: {fields[key]!r} and {value!r}")
        fields[key] = value
    return fields


def check_executor_options(executor: str, workers: int, no_wait: bool) -> None:
    """Raise ConfigError for an unknown executor, or workers that go with neither it nor --no-wait."""
    if executor not in EXECUTORS:
        raise build_unknown_name_error("executor", executor, EXECUTORS)
    if executor != "local" and (workers != 1 or no_wait):
        raise ConfigError(
            f"--executor {executor} takes neither --workers nor --no-wait: --max-jobs limits its jobs, and "
            "--detach does not wait"
        )
    if workers < 1:
        raise ConfigError(f"--workers {workers}: expected a number of processes from 1")
    if workers > 1 and no_wait:
        raise ConfigError(f"--workers {workers} and --no-wait: the workers of a run wait for each other")


def check_output_file(output: Path | None, example: str, option: str = "-o") -> None:
    """Raise ConfigError unless an output names a file in a folder that is, or can be, written; None is fine.

    example: Name of a file, option: what named the output, both for the message.
    """
    if output is None:
        return
    if output.is_dir():
        raise ConfigError(
            f"{option} {str(output)!r} is a folder; name a file in it, such as {output / example}"
        )
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{option} {str(output)!r}: {str(nearest)!r} is a file; name a file in a folder")
    if not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"{option} {str(output)!r}: cannot write in the folder {str(nearest)!r}; choose another one"
        )
