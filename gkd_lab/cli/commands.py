"""The command line: parse, call, print. torch is loaded by `run`, `cell` and `selfcheck` only, at work.

Exit status: 0 all is done; 1 something failed, named, with where its log is; 2 the request is wrong.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gkd_lab import __version__, experiments
from gkd_lab.cli.options import (
    ComparisonFormat,
    Executor,
    Follow,
    Held,
    Name,
    NoWait,
    Outputs,
    Pack,
    Retry,
    Scale,
    Sets,
    TableFormat,
    TermGradients,
    Worker,
    Workers,
    check_executor,
    check_folder,
    fields_of,
    grid_named,
    leave,
    metrics_named,
    overrides_of,
    resolved_anew,
    value_of,
    workers_of,
    writable,
)
from gkd_lab.cli.run_commands import SIGNALLED, is_agents, run_cells, run_workers, tracker_asked
from gkd_lab.config import SpecError
from gkd_lab.config.packs import parse_limit
from gkd_lab.store import DamagedRecord, Store
from gkd_lab.store.files import write_bytes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Grids of generalized knowledge distillation: from an experiment file to a figure.",
)


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
    from gkd_lab.status.render import aligned, folded

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
    from gkd_lab.status.overview import overview
    from gkd_lab.status.render import cell_lines, summary_lines

    limit = parse_limit(pack)
    grid = grid_named(name, scale, sets, outputs)
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
    from gkd_lab.status.overview import overview
    from gkd_lab.status.render import cell_lines, failure_lines, reference_lines

    grid = grid_named(name, scale, sets, outputs)
    if watch:
        from gkd_lab.status.watch import watch as watch_until_settled

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
    term_gradients: TermGradients = False,
    worker: Worker = None,
) -> None:
    """Train and evaluate every cell; what is done is not done again."""
    check_executor(executor, workers, no_wait)
    limit = parse_limit(pack)
    chosen = tracker_asked(tracker)
    if is_agents() and chosen == "wandb":
        raise SpecError("a sweep agent's run is one cell: let it call `gkd-lab cell`, or say --tracker none")
    grid = grid_named(name, scale, sets, outputs)
    if workers == 1:
        held: Literal["pass", "wait"] = "pass" if no_wait else "wait"
        count = workers_of(worker)
        run_cells(
            grid, outputs, limit, retry_failed, chosen, held, workers=count, term_gradients=term_gradients
        )
        return
    words = ["run", name, "--outputs", str(outputs), "--pack", pack, "--tracker", chosen]
    words += [] if scale is None else ["--scale", scale.value]
    words += ["--term-gradients"] if term_gradients else []
    for text in sets or ():
        words += ["--set", text]
    run_workers(grid, outputs, workers, words, retry_failed)


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
    chosen = tracker_asked(tracker)
    try:
        check_folder(outputs)
        fields = fields_of(context.args)
        grid = experiments.load_one(fields, name=experiment, scale=value_of(scale), outputs=outputs)
    except SpecError as error:
        if is_agents() and chosen == "wandb":
            from gkd_lab.runner.wandb_tracker import refused

            refused(str(error))
        raise
    run_cells(grid, outputs, "off", retry_failed, chosen, held.value)
    print(Store(outputs).of(grid.cells[0]).folder)


@app.command()
def sweep(name: Name, scale: Scale = None, sets: Sets = None) -> None:
    """Print a sweep file for wandb agents, whose cells are the experiment's."""
    from gkd_lab.config.sweep import sweep_file

    fields = overrides_of(sets)
    experiment, _ = experiments.outline(name, scale=value_of(scale), overrides=fields)
    print(sweep_file(name, experiment, value_of(scale), fields), end="")


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
    from gkd_lab.tables.table import encode
    from gkd_lab.tables.table import table as read_table

    grid, store = grid_named(name, scale, sets, outputs), Store(outputs)
    frame = read_table(grid, store)
    if format is TableFormat.parquet:
        from gkd_lab.tables.table_sources import sources

        frame.attrs.update(sources(grid, store))
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
    from gkd_lab.config.lm_eval_task import lm_task
    from gkd_lab.store.lookup import find_record

    check_folder(outputs)
    record = find_record(cell, outputs)
    names = list(filter(None, (name.strip() for name in tasks.split(","))))
    if not names:
        raise SpecError(f"--tasks {tasks!r}: expected tasks of lm-eval or YAML files, as NAME,FILE.yaml")
    if record.state() != "done":
        raise SpecError(f"{record.folder}: its training is {record.state()}, finish it first")
    for name in names:
        lm_task(name, trusted=trust_remote_code)
    writable(record.folder)
    from gkd_lab.runner.library_logging import quieten
    from gkd_lab.runner.lm_eval_runs import evaluate_record
    from gkd_lab.runner.run_options import RunOptions

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
    from gkd_lab.claims.definitions import CLAIMS
    from gkd_lab.claims.judge import judge_paper
    from gkd_lab.claims.run_claims import judge_run
    from gkd_lab.claims.verdict_text import as_json, text_lines

    asked: Sequence[str] = ()
    if name == "paper":
        if scale is not None or sets:
            raise SpecError("the paper's own numbers have no --scale and nothing to --set")
        found = judge_paper(CLAIMS.values())
    else:
        grid = grid_named(name, scale, sets, outputs)
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
    from gkd_lab.report.html_report import write_report

    grid = grid_named(name, scale, sets, outputs)
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
    from gkd_lab.report.comparison import compare as compare_records
    from gkd_lab.report.comparison_text import as_json, show
    from gkd_lab.store.lookup import find_record

    check_folder(outputs)
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
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.tables.rescoring import jobs
    from gkd_lab.tables.rescoring import rescore as rescore_all
    from gkd_lab.tables.rescoring_text import rescored_lines, unscored_lines

    asked = metrics_named(metrics)
    grid = grid_named(name, scale, sets, outputs)
    work, missing = jobs(grid, Store(outputs), asked)
    if not work:
        leave(f"nothing to rescore: {grid.name} has no finished evaluation below {str(outputs)!r} yet", 1)
    try:
        with Reporter().phase(f"{grid.name}: records", len(work)) as advance:
            outcome = rescore_all(work, advance)
    except OSError as error:
        leave(f"{error}; what was rescored is kept, rescore again to go on", 1)
    print("\n".join(rescored_lines(outcome, len(work))))
    for line in unscored_lines(grid, outcome, missing):
        print(line, file=sys.stderr)
    if not outcome.whole:
        raise typer.Exit(1)


@app.command()
def verify(name: Name, scale: Scale = None, sets: Sets = None, outputs: Outputs = Path("outputs")) -> None:
    """Read every record again; report what no longer matches its fingerprint."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.status.verify import candidates
    from gkd_lab.status.verify import verify as verify_all

    grid_named(name, scale, sets, outputs)  # what is wrong with the request is said of these outputs
    grid, store = resolved_anew(name, scale, sets, outputs), Store(outputs)
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


@app.command()
def selfcheck(
    teacher: Annotated[str | None, typer.Option(help="A folder or a hub name. Default: made.")] = None,
    student: Annotated[str | None, typer.Option(help="A folder or a hub name. Default: made.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Also compare with bfloat16.")] = False,
) -> None:
    """Measure on a pair of models what distillation relies on; train nothing, write no file."""
    from gkd_lab.runner.library_logging import quieten
    from gkd_lab.selfcheck.command import selfcheck as check

    quieten()
    if not check(teacher, student, bf16=bf16):
        raise typer.Exit(1)


_INTERRUPTED = "interrupted; run again to go on from the last checkpoint"
_Refused: type[Exception] = typer.BadParameter.__mro__[1]
"""typer's UsageError: an unknown option or command, a missing or invalid value."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `gkd-lab`: exits with 0, 1 or 2; a traceback only for a bug of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    asked = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        left_with = app(args=asked, prog_name="gkd-lab", standalone_mode=False)
    except SpecError as error:
        leave(str(error), 2)
    except _Refused as error:
        leave(_one_line(error), 2)
    except DamagedRecord as error:
        leave(str(error), 1)
    except OSError as error:
        leave(str(error), 1)
    except KeyboardInterrupt:
        leave(_INTERRUPTED, 130)
    except SystemExit as stop:
        if stop.code == SIGNALLED + signal.SIGTERM:
            leave(_INTERRUPTED, stop.code)
        raise
    if left_with == 130:  # how typer returns from Ctrl-C
        leave(_INTERRUPTED, 130)
    sys.exit(left_with or 0)


def _one_line(error: Any) -> str:
    # pydantic checks typer's values and announces its own errors so.
    text = error.format_message().replace("Value error, ", "").rstrip(".")
    command = error.ctx.command_path if error.ctx else "gkd-lab"
    return f"{text}; see `{command} --help`"


if __name__ == "__main__":
    main()
