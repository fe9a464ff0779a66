"""The command line: parse, call, print. torch is loaded by `run`, `cell` and `selfcheck` only, at work.

Exit status: 0 all is done; 1 something failed, named, with where its log is; 2 the request is wrong.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from gkd_lab import __version__, experiments
from gkd_lab.records import DamagedRecord, Store
from gkd_lab.records.files import write_bytes
from gkd_lab.spec import GridOfCells, SpecError
from gkd_lab.spec.errors import unknown
from gkd_lab.spec.packs import PackLimit, parse_limit

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


class TrackerChoice(StrEnum):
    """Choices of --tracker."""

    none = "none"
    wandb = "wandb"
    trackio = "trackio"


class Held(StrEnum):
    """Choices of --held."""

    wait = "wait"
    skip = "pass"


class ComparisonFormat(StrEnum):
    """Choices of compare's --format."""

    text = "text"
    json = "json"


Name = Annotated[str, typer.Argument(metavar="EXP", help="A name in experiments/, or a YAML file.")]
Scale = Annotated[ScaleName | None, typer.Option(help="Default: the experiment's own.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=V1,V2", help="Replace an axis or a field; repeatable."),
]
Outputs = Annotated[Path, typer.Option(envvar="GKD_LAB_OUTPUTS", help="Folder of all records.")]
Pack = Annotated[str, typer.Option(help="auto, off, or the most cells that share one model.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Try failed cells again.")]
Follow = Annotated[
    TrackerChoice | None, typer.Option("--tracker", help="Default: wandb under a sweep agent, else none.")
]
Executor = Annotated[str, typer.Option(help="local; ray and slurm are not built yet.")]
Workers = Annotated[int, typer.Option(help="Processes that share out the packs of cells, and the cores.")]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Leave cells that other processes work on; default: wait for them.")
]
Worker = Annotated[str | None, typer.Option(hidden=True, metavar="K/N", help="This process is a worker.")]


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
    from gkd_lab.results.listing import aligned, folded

    found, broken = [], []
    for name in experiments.names():
        try:
            experiment, cells = experiments.outline(name)
        except SpecError as error:
            found.append([name, "?", "", "cannot be read, see below"])
            broken.append(f"gkd-lab: {error}")
            continue
        figures = ", ".join(experiment.paper.figures)
        question = experiment.description.split(". ")[0].strip()
        found.append([name, str(cells), figures, question])
    for line in aligned(["experiment", "cells", "figures", "question"], folded(found)):
        print(line)
    for line in broken:
        print(line, file=sys.stderr)
    if broken:
        raise typer.Exit(2)


@app.command()
def plan(
    name: Name,
    scale: Scale = None,
    sets: Sets = None,
    outputs: Outputs = Path("outputs"),
    pack: Pack = "auto",
) -> None:
    """Show every cell with its status and cost; run nothing."""
    from gkd_lab.results.listing import cell_lines, summary_lines
    from gkd_lab.results.overview import overview

    limit = parse_limit(pack)
    grid = _grid(name, scale, sets, outputs)
    found = overview(grid, Store(outputs), limit)
    print("\n".join((*cell_lines(grid, found, progress=False), *summary_lines(found))))


@app.command()
def status(
    name: Name,
    scale: Scale = None,
    sets: Sets = None,
    outputs: Outputs = Path("outputs"),
    watch: Annotated[bool, typer.Option("--watch", help="Look again until all is done, or Ctrl-C.")] = False,
) -> None:
    """Show how far every cell is, who works on it and how fast, and why it failed."""
    from gkd_lab.results.listing import cell_lines, failure_lines, reference_lines
    from gkd_lab.results.overview import overview

    grid = _grid(name, scale, sets, outputs)
    if watch:
        from gkd_lab.results.watching import watch as watch_until_settled

        found = watch_until_settled(grid, Store(outputs))
    else:
        found = overview(grid, Store(outputs), "auto")
    print("\n".join((*cell_lines(grid, found, progress=True), *reference_lines(found))))
    failed = list(failure_lines(found))
    for line in failed:
        print(line)
    if failed:
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
    tracker: Follow = None,
    no_wait: NoWait = False,
    worker: Worker = None,
) -> None:
    """Train and evaluate every cell; what is done is not done again."""
    _check_executor(executor, workers, no_wait)
    limit = parse_limit(pack)
    chosen = _tracker(tracker)
    if _is_agents() and chosen == "wandb":
        raise SpecError("a sweep agent's run is one cell: let it call `gkd-lab cell`, or say --tracker none")
    grid = _grid(name, scale, sets, outputs)
    if workers == 1:
        held: Literal["pass", "wait"] = "pass" if no_wait else "wait"
        _run(grid, outputs, limit, retry_failed, chosen, held, workers=_worker(worker))
        return
    words = ["run", name, "--outputs", str(outputs), "--pack", pack, "--tracker", chosen]
    words += [] if scale is None else ["--scale", scale.value]
    for text in sets or ():
        words += ["--set", text]
    _run_workers(grid, outputs, workers, words, retry_failed)


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
    tracker: Follow = None,
    held: Annotated[
        Held, typer.Option(help="A cell that another process works on: wait for it, or pass it over.")
    ] = Held.wait,
) -> None:
    """Run one cell: `--task arithmetic --lmbda 0.5 --beta 0.1 --seed 0 ...`, as a sweep agent calls it."""
    chosen = _tracker(tracker)
    try:
        _check_folder(outputs)
        fields = _fields(context.args)
        grid = experiments.load_one(fields, name=experiment, scale=_value(scale), outputs=outputs)
    except SpecError as error:
        if _is_agents() and chosen == "wandb":
            from gkd_lab.runs.wandb_runs import refused

            refused(str(error))
        raise
    _run(grid, outputs, "off", retry_failed, chosen, held.value)
    print(Store(outputs).of(grid.cells[0]).folder)


@app.command()
def sweep(name: Name, scale: Scale = None, sets: Sets = None) -> None:
    """Print a sweep file for wandb agents, whose cells are the experiment's."""
    from gkd_lab.spec.sweep import sweep_file

    fields = _overrides(sets)
    experiment, _ = experiments.outline(name, scale=_value(scale), overrides=fields)
    print(sweep_file(name, experiment, _value(scale), fields), end="")


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

    grid, store = _grid(name, scale, sets, outputs), Store(outputs)
    frame = read_table(grid, store)
    if format is TableFormat.parquet:
        from gkd_lab.results.sources import sources

        frame.attrs = sources(grid, store)
    content = encode(frame, format.value)
    if output is None:
        sys.stdout.buffer.write(content)
    elif output.is_dir():
        raise SpecError(f"-o {str(output)!r} is a folder; name a file in it")
    else:
        write_bytes(output, content)


@app.command()
def evaluate(
    cell: Annotated[
        str, typer.Argument(metavar="CELL", help="A record's folder, or the first digits of its fingerprint.")
    ],
    tasks: Annotated[
        str,
        typer.Option(metavar="NAME,FILE.yaml", help="Of lm-eval; `own`: the cell's own task as one."),
    ],
    outputs: Outputs = Path("outputs"),
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; default all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Default: each task's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents at once.")] = 16,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let task files run their Python code.")
    ] = False,
) -> None:
    """Run tasks of lm-eval on a finished cell; `table` shows their scores beside its own."""
    from gkd_lab.records.finding import find_record
    from gkd_lab.spec.lm_task import lm_task

    _check_folder(outputs)
    record = find_record(cell, outputs)
    names = list(filter(None, (name.strip() for name in tasks.split(","))))
    if not names:
        raise SpecError(f"--tasks {tasks!r}: expected tasks of lm-eval or YAML files, as NAME,FILE.yaml")
    if record.state() != "done":
        raise SpecError(f"{record.folder}: its training is {record.state()}, finish it first")
    for name in names:
        lm_task(name, trusted=trust_remote_code)
    _writable(record.folder)
    from gkd_lab.runs.harness import evaluate_record
    from gkd_lab.runs.options import RunOptions
    from gkd_lab.runs.quiet import quieten

    quieten()
    found = evaluate_record(
        record,
        names,
        RunOptions(outputs),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        trusted=trust_remote_code,
    )
    failed = [one for one in found if one.part.state() == "failed"]
    for one in found:
        for metric, score in one.part.scores().items() if one not in failed else ():
            print(f"{one.evaluation.name}/{metric}: {_score(score)}")
    for one in failed:
        reason = f"{one.part.status()['error']} (see {one.part.status_file})"
        print(f"failed: {one.evaluation.name}: {reason}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _score(score: dict[str, Any]) -> str:
    value = "no number" if score["value"] is None else f"{score['value']:.4f}"
    return f"{value} [{score['low']:.4f}, {score['high']:.4f}]" if "low" in score else value


@app.command()
def claims(
    name: Annotated[
        str, typer.Argument(metavar="EXP|paper", help="An experiment; `paper`: the paper's own numbers.")
    ],
    scale: Scale = None,
    sets: Sets = None,
    outputs: Outputs = Path("outputs"),
    format: Annotated[ComparisonFormat, typer.Option(help="Of what is printed.")] = ComparisonFormat.text,
) -> None:
    """Say which of the paper's claims hold in a run, or in the paper's own numbers."""
    from gkd_lab.results.claims import CLAIMS
    from gkd_lab.results.claims_judging import judge_paper
    from gkd_lab.results.claims_of_run import judge_run
    from gkd_lab.results.claims_text import as_json, text_lines

    asked: Sequence[str] = ()
    if name == "paper":
        if scale is not None or sets:
            raise SpecError("the paper's own numbers have no --scale and nothing to --set")
        found = judge_paper(CLAIMS.values())
    else:
        grid = _grid(name, scale, sets, outputs)
        asked = grid.experiment.paper.claims
        found = judge_run(grid, Store(outputs))
    print(as_json(found) if format is ComparisonFormat.json else "\n".join(text_lines(found, asked)))


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


@app.command()
def compare(
    cell_a: Annotated[str, typer.Argument(metavar="CELL_A", help="A record's folder, or its first digits.")],
    cell_b: Annotated[str, typer.Argument(metavar="CELL_B", help="The same; B - A is shown.")],
    metric: Annotated[str | None, typer.Option(help="Default: the first that both were judged by.")] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="By name, such as greedy. Default: the first that both have.")
    ] = None,
    outputs: Outputs = Path("outputs"),
    format: Annotated[ComparisonFormat, typer.Option(help="Of what is printed.")] = ComparisonFormat.text,
) -> None:
    """Show how two cells differ: settings, scores, paired difference, the examples that differ most."""
    from gkd_lab.records.finding import find_record
    from gkd_lab.results.comparing import compare as compare_records
    from gkd_lab.results.comparing_text import as_json, show

    _check_folder(outputs)
    pair = find_record(cell_a, outputs), find_record(cell_b, outputs)
    found = compare_records(*pair, evaluation=evaluation, metric=metric)
    if format is ComparisonFormat.json:
        print(as_json(found))
    else:
        show(found)


@app.command()
def rescore(
    name: Name,
    metrics: Annotated[
        str | None, typer.Option(metavar="M1,M2", help="Default: those that the evaluations ask for.")
    ] = None,
    scale: Scale = None,
    sets: Sets = None,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Compute metrics anew from the stored predictions of every cell; load no model."""
    from gkd_lab.results.rescoring import jobs
    from gkd_lab.results.rescoring import rescore as rescore_all
    from gkd_lab.results.rescoring_text import rescored_lines, unscored_lines
    from gkd_lab.runs.progress import Reporter

    asked = _metrics(metrics)
    grid = _grid(name, scale, sets, outputs)
    work, missing = jobs(grid, Store(outputs), asked)
    if not work:
        _leave(f"nothing to rescore: {grid.name} has no finished evaluation below {str(outputs)!r} yet", 1)
    try:
        with Reporter().phase(f"{grid.name}: records", len(work)) as advance:
            outcome = rescore_all(work, advance)
    except OSError as error:
        _leave(f"{error}; what was rescored is kept, rescore again to go on", 1)
    print("\n".join(rescored_lines(outcome, len(work))))
    for line in unscored_lines(grid, outcome, missing):
        print(line, file=sys.stderr)
    if not outcome.whole:
        raise typer.Exit(1)


def _metrics(names: str | None) -> tuple[str, ...] | None:
    from gkd_lab.metrics import METRICS

    if names is None:
        return None
    asked = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not asked:
        raise SpecError(f"--metrics {names!r} names none; valid: {', '.join(METRICS)}")
    for name in asked:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return asked


@app.command()
def verify(name: Name, scale: Scale = None, sets: Sets = None, outputs: Outputs = Path("outputs")) -> None:
    """Read every record again; report what no longer matches its fingerprint."""
    from gkd_lab.results.verifying import candidates
    from gkd_lab.results.verifying import verify as verify_all
    from gkd_lab.runs.progress import Reporter

    _grid(name, scale, sets, outputs)  # what is wrong with the request is said of these outputs
    grid, store = _resolved_anew(name, scale, sets, outputs), Store(outputs)
    records = candidates(grid, store)
    with Reporter().phase(f"{grid.name}: records", len(records)) as advance:
        found = verify_all(grid, store, records, advance)
    for line in found.notes:
        print(f"note: {line}")
    for line in found.mismatches:
        print(f"mismatch: {line}")
    read = f"{found.records} records, {found.evaluations} evaluations and {found.files} hashed files"
    missing = f"; {found.missing} of {len(grid.cells)} cells were not begun" if found.missing else ""
    verdict = f"{len(found.mismatches)} do not match" if found.mismatches else "all match"
    print(f"{grid.name}: {read} read, {verdict}{missing}")
    if found.mismatches:
        raise typer.Exit(1)


def _resolved_anew(
    name: str, scale: ScaleName | None, sets: Sequence[str] | None, outputs: Path
) -> GridOfCells:
    """The grid from data and models as they are: hashes that were kept for unchanged files are not used."""
    known = outputs / "revisions.json"
    with tempfile.TemporaryDirectory() as folder:
        if known.is_file():
            write_bytes(Path(folder) / known.name, known.read_bytes())
        return _grid(name, scale, sets, Path(folder))


@app.command()
def selfcheck(
    teacher: Annotated[str | None, typer.Option(help="A folder or a hub name. Default: made.")] = None,
    student: Annotated[str | None, typer.Option(help="A folder or a hub name. Default: made.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Also compare with bfloat16.")] = False,
) -> None:
    """Measure on a pair of models what distillation relies on; train nothing, write no file."""
    from gkd_lab.runs.quiet import quieten
    from gkd_lab.runs.selfcheck import selfcheck as check

    quieten()
    if not check(teacher, student, bf16=bf16):
        raise typer.Exit(1)


def _run(
    grid: GridOfCells,
    outputs: Path,
    limit: PackLimit,
    retry_failed: bool,
    tracker: Literal["none", "wandb", "trackio"],
    held: Literal["pass", "wait"] = "pass",
    *,
    workers: int = 1,
) -> None:
    """Run a grid in this process, which may be one of several `workers` of the same run."""
    from gkd_lab.runs.stopping import signals_heard

    with signals_heard():
        _run_here(grid, outputs, limit, retry_failed, tracker, held, workers)


def _run_here(
    grid: GridOfCells,
    outputs: Path,
    limit: PackLimit,
    retry_failed: bool,
    tracker: Literal["none", "wandb", "trackio"],
    held: Literal["pass", "wait"],
    workers: int,
) -> None:
    store = Store(_writable(outputs))
    if not retry_failed and _all_done(grid, store):
        if tracker == "wandb" and _is_agents():
            _replay(grid, store)
        print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)
        return
    experiments.check_sources(grid)
    from gkd_lab.runs.options import RunOptions
    from gkd_lab.runs.progress import Reporter
    from gkd_lab.runs.quiet import quieten
    from gkd_lab.runs.run import run as run_grid
    from gkd_lab.runs.tracking import tracker_named

    reporter = Reporter()
    followed = tracker_named(tracker, grid.name, outputs, reporter)
    options = RunOptions(
        outputs,
        pack=limit,
        retry_failed=retry_failed,
        reporter=reporter,
        tracker=followed,
        held=held,
        workers=workers,
    )
    quieten()
    try:
        outcome = run_grid(grid, options)
    except OSError as error:
        _leave(f"{error}; what was finished is kept, run again to go on", 1)
    for line in outcome.failed:
        print(f"failed: {line}", file=sys.stderr)
    if outcome.elsewhere:
        print(f"{outcome.elsewhere} cells are being run by another process", file=sys.stderr)
    # A cell that an agent passes over is no failure of its own: three of these would stop the agent.
    if outcome.failed or (outcome.elsewhere and not _is_agents()):
        raise typer.Exit(1)
    if outcome.elsewhere or workers > 1:
        return
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def _run_workers(
    grid: GridOfCells, outputs: Path, count: int, words: Sequence[str], retry_failed: bool
) -> None:
    """Run a grid in `count` processes, each started with `words`; exits unless all is done."""
    from gkd_lab.runs.progress import Reporter
    from gkd_lab.runs.workers import Workers as Processes
    from gkd_lab.runs.workers import forget_failures

    store = Store(_writable(outputs))
    if retry_failed:
        forget_failures(grid, store)
    if not _all_done(grid, store):
        experiments.check_sources(grid)
        processes = Processes(count, [sys.executable, "-m", "gkd_lab", *words], Reporter().say)
        status = processes.wait()
        for line in processes.failed:
            print(line, file=sys.stderr)
        if status == _SIGNALLED + signal.SIGINT:
            raise KeyboardInterrupt
        if status > _SIGNALLED:
            raise SystemExit(status)
        # What a killed worker left undone, the others did.
        if status and not _all_done(grid, store):
            raise typer.Exit(status)
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def _worker(text: str | None) -> int:
    """N of `K/N`: how many workers a run has."""
    return 1 if text is None else int(text.partition("/")[2])


def _replay(grid: GridOfCells, store: Store) -> None:
    """Into the agent's run; torch is not loaded."""
    from gkd_lab.runs.progress import Reporter
    from gkd_lab.runs.tracking import replay, tracker_named

    reporter = Reporter()
    replay(grid, store, tracker_named("wandb", grid.name, store.root, reporter))


def _tracker(asked: TrackerChoice | None) -> Literal["none", "wandb", "trackio"]:
    if asked is not None:
        return asked.value
    return "wandb" if _is_agents() else "none"


def _is_agents() -> bool:
    """Whether a wandb sweep agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _all_done(grid: GridOfCells, store: Store) -> bool:
    from gkd_lab.results.rows import rows

    return all(row["status"] == "done" for row in rows(grid, store))


def _grid(name: str, scale: ScaleName | None, sets: Sequence[str] | None, outputs: Path) -> GridOfCells:
    _check_folder(outputs)
    return experiments.load(name, scale=_value(scale), overrides=_overrides(sets), outputs=outputs)


def _overrides(sets: Sequence[str] | None) -> dict[str, str]:
    """`--set` texts, by key."""
    overrides: dict[str, str] = {}
    for text in sets or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {text!r}: expected KEY=VALUE or KEY=V1,V2")
        overrides[key.strip()] = value
    return overrides


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
            if not rest or rest[0].startswith("--"):
                raise SpecError(f"{option} has no value: fields of a cell are given as --FIELD VALUE")
            value = rest.pop(0)
        if not key:
            raise SpecError(f"{option!r} names no field: they are given as --FIELD VALUE")
        if key in fields:
            raise SpecError(f"--{key} is given twice: {fields[key]!r} and {value!r}")
        fields[key] = value
    return fields


def _check_executor(executor: str, workers: int, no_wait: bool) -> None:
    if executor in ("ray", "slurm"):
        raise SpecError(f"--executor {executor} is not built yet; valid: local")
    if executor != "local":
        raise SpecError(f"unknown executor {executor!r}; valid: local")
    if workers < 1:
        raise SpecError(f"--workers {workers}: expected a number of processes from 1")
    if workers > 1 and no_wait:
        raise SpecError(f"--workers {workers} and --no-wait: the workers of a run wait for each other")


def _check_folder(outputs: Path) -> None:
    if outputs.exists() and not outputs.is_dir():
        raise SpecError(f"--outputs {str(outputs)!r} is a file; expected a folder, or none yet")


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


_INTERRUPTED = "interrupted; run again to go on from the last checkpoint"
_SIGNALLED = 128
"""Exit statuses from here on: 128 and the number of the signal that stopped the work."""
_Refused: type[Exception] = typer.BadParameter.__mro__[1]
"""typer's UsageError: an unknown option or command, a missing or invalid value."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `gkd-lab`: exits with 0, 1 or 2; a traceback only for a bug of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    asked = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        left_with = app(args=asked, prog_name="gkd-lab", standalone_mode=False)
    except SpecError as error:
        _leave(str(error), 2)
    except _Refused as error:
        _leave(_one_line(error), 2)
    except DamagedRecord as error:
        _leave(str(error), 1)
    except OSError as error:
        _leave(str(error), 1)
    except KeyboardInterrupt:
        _leave(_INTERRUPTED, 130)
    except SystemExit as stop:
        if stop.code == _SIGNALLED + signal.SIGTERM:
            _leave(_INTERRUPTED, stop.code)
        raise
    if left_with == 130:  # how typer returns from Ctrl-C
        _leave(_INTERRUPTED, 130)
    sys.exit(left_with or 0)


def _one_line(error: Any) -> str:
    # pydantic checks typer's values and announces its own errors so.
    text = error.format_message().replace("Value error, ", "").rstrip(".")
    command = error.ctx.command_path if error.ctx else "gkd-lab"
    return f"{text}; see `{command} --help`"


def _leave(message: str, status: int) -> NoReturn:
    print(f"gkd-lab: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
