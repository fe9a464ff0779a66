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
    ExecutorOption,
    ExperimentArgument,
    LockedCellAction,
    NoWaitOption,
    OutputFormat,
    OutputsOption,
    PackOption,
    RetryFailedOption,
    ScaleOption,
    SetOption,
    TableFormat,
    TermGradientsOption,
    TrackerOption,
    WorkerOption,
    WorkersOption,
    check_executor_options,
    check_outputs_folder,
    create_outputs_folder,
    exit_with_message,
    get_scale_value,
    load_grid,
    load_grid_without_cache,
    parse_cell_fields,
    parse_metric_names,
    parse_overrides,
    parse_worker_count,
)
from gkd_lab.cli.run_commands import SIGNAL_EXIT_BASE, choose_tracker, is_sweep_agent, run_cells, run_workers
from gkd_lab.config import ConfigError
from gkd_lab.config.packs import parse_pack_limit
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
    from gkd_lab.status.render import Listing, print_listing

    rows, broken = [], []
    for name in experiments.list_experiment_files():
        try:
            experiment, cells = experiments.outline_experiment(name)
        except ConfigError as error:
            rows.append([name, "?", "", "cannot be read, see below"])
            broken.append(f"gkd-lab: {error}")
            continue
        figures = ", ".join(experiment.paper.figures)
        question = experiment.description.split(". ")[0].strip()
        rows.append([name, str(cells), figures, question])
    print_listing(Listing(["experiment", "cells", "figures", "question"], rows))
    for line in broken:
        print(line, file=sys.stderr)
    if broken:
        raise typer.Exit(2)


@app.command()
def plan(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    pack: PackOption = "auto",
) -> None:
    """Show every cell with its status and cost; run nothing."""
    from gkd_lab.status.overview import build_overview
    from gkd_lab.status.render import list_cells, print_listing, render_summary

    limit = parse_pack_limit(pack)
    grid = load_grid(name, scale, sets, outputs)
    overview = build_overview(grid, Store(outputs), limit)
    print_listing(list_cells(grid, overview, show_progress=False))
    print("\n".join(render_summary(overview)))


@app.command()
def status(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    watch: Annotated[bool, typer.Option("--watch", help="Look again until all is done, or Ctrl-C.")] = False,
) -> None:
    """Show how far every cell is, who works on it and how fast, and why it failed."""
    from gkd_lab.status.overview import build_overview
    from gkd_lab.status.render import list_cells, print_listing, render_failures, render_running_artifacts

    grid = load_grid(name, scale, sets, outputs)
    if watch:
        from gkd_lab.status.terminal import watch_grid

        overview = watch_grid(grid, Store(outputs))
    else:
        overview = build_overview(grid, Store(outputs), "auto")
    print_listing(list_cells(grid, overview, show_progress=True))
    failures = list(render_failures(overview))
    for line in (*render_running_artifacts(overview), *failures):
        print(line)
    if failures:
        raise typer.Exit(1)


@app.command()
def run(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    pack: PackOption = "auto",
    retry_failed: RetryFailedOption = False,
    workers: WorkersOption = 1,
    executor: ExecutorOption = "local",
    tracker: TrackerOption = None,
    no_wait: NoWaitOption = False,
    term_gradients: TermGradientsOption = False,
    worker: WorkerOption = None,
) -> None:
    """Train and evaluate every cell; what is done is not done again."""
    check_executor_options(executor, workers, no_wait)
    limit = parse_pack_limit(pack)
    chosen = choose_tracker(tracker)
    if is_sweep_agent() and chosen == "wandb":
        raise ConfigError(
            "a sweep agent's run is one cell: let it call `gkd-lab cell`, or say --tracker none"
        )
    grid = load_grid(name, scale, sets, outputs)
    if workers == 1:
        held: Literal["pass", "wait"] = "pass" if no_wait else "wait"
        count = parse_worker_count(worker)
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
    scale: ScaleOption = None,
    outputs: OutputsOption = Path("outputs"),
    retry_failed: RetryFailedOption = False,
    tracker: TrackerOption = None,
    held: Annotated[
        LockedCellAction,
        typer.Option(help="A cell that another process works on: wait for it, or pass it over."),
    ] = LockedCellAction.wait,
) -> None:
    """Run one cell: `--task arithmetic --lmbda 0.5 --beta 0.1 --seed 0 ...`, as a sweep agent calls it."""
    chosen = choose_tracker(tracker)
    try:
        check_outputs_folder(outputs)
        fields = parse_cell_fields(context.args)
        grid = experiments.load_single_cell(
            fields, name=experiment, scale=get_scale_value(scale), outputs=outputs
        )
    except ConfigError as error:
        if is_sweep_agent() and chosen == "wandb":
            from gkd_lab.runner.wandb_tracker import report_refused_parameters

            report_refused_parameters(str(error))
        raise
    run_cells(grid, outputs, "off", retry_failed, chosen, held.value)
    print(Store(outputs).get_record(grid.cells[0]).folder)


@app.command()
def sweep(name: ExperimentArgument, scale: ScaleOption = None, sets: SetOption = None) -> None:
    """Print a sweep file for wandb agents, whose cells are the experiment's."""
    from gkd_lab.config.sweep import format_sweep_file

    fields = parse_overrides(sets)
    experiment, _ = experiments.outline_experiment(name, scale=get_scale_value(scale), overrides=fields)
    print(format_sweep_file(name, experiment, get_scale_value(scale), fields), end="")


@app.command()
def table(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    format: Annotated[TableFormat, typer.Option(help="Of what is written.")] = TableFormat.md,
    output: Annotated[Path | None, typer.Option("-o", help="A file; default: stdout.")] = None,
) -> None:
    """Write one row per cell and reference model, with status and scores."""
    from gkd_lab.tables.table import encode_table
    from gkd_lab.tables.table import table as read_table

    grid, store = load_grid(name, scale, sets, outputs), Store(outputs)
    frame = read_table(grid, store)
    if format is TableFormat.parquet:
        from gkd_lab.tables.table import collect_table_provenance

        frame.attrs.update(collect_table_provenance(grid, store))
    content = encode_table(frame, format.value)
    if output is None:
        sys.stdout.buffer.write(content)
    elif output.is_dir():
        raise ConfigError(f"-o {str(output)!r} is a folder; name a file in it")
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
    outputs: OutputsOption = Path("outputs"),
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; default all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Default: each task's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents at once.")] = 16,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let task files run their Python code.")
    ] = False,
) -> None:
    """Run tasks of lm-eval on a finished cell; `table` shows their scores beside its own."""
    from gkd_lab.config.lm_eval_task import resolve_lm_eval_task
    from gkd_lab.store.lookup import find_record

    check_outputs_folder(outputs)
    record = find_record(cell, outputs)
    names = list(filter(None, (name.strip() for name in tasks.split(","))))
    if not names:
        raise ConfigError(f"--tasks {tasks!r}: expected tasks of lm-eval or YAML files, as NAME,FILE.yaml")
    if record.read_state() != "done":
        raise ConfigError(f"{record.folder}: its training is {record.read_state()}, finish it first")
    for name in names:
        resolve_lm_eval_task(name, trusted=trust_remote_code)
    create_outputs_folder(record.folder)
    from gkd_lab.runner.library_logging import silence_libraries
    from gkd_lab.runner.lm_eval_runs import evaluate_record
    from gkd_lab.runner.run_options import RunOptions

    silence_libraries()
    found = evaluate_record(
        record,
        names,
        RunOptions(outputs),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        trusted=trust_remote_code,
    )
    failed = [one for one in found if one.record.read_state() == "failed"]
    for one in found:
        for metric, score in one.record.read_scores().items() if one not in failed else ():
            print(f"{one.evaluation.name}/{metric}: {_format_score(score)}")
    for one in failed:
        reason = f"{one.record.read_status()['error']} (see {one.record.status_file})"
        print(f"failed: {one.evaluation.name}: {reason}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _format_score(score: dict[str, Any]) -> str:
    value = "no number" if score["value"] is None else f"{score['value']:.4f}"
    return f"{value} [{score['low']:.4f}, {score['high']:.4f}]" if "low" in score else value


@app.command()
def claims(
    name: Annotated[
        str, typer.Argument(metavar="EXP|paper", help="An experiment; `paper`: the paper's own numbers.")
    ],
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    format: Annotated[OutputFormat, typer.Option(help="Of what is printed.")] = OutputFormat.text,
) -> None:
    """Say which of the paper's claims hold in a run, or in the paper's own numbers."""
    from gkd_lab.claims.definitions import CLAIMS
    from gkd_lab.claims.judge import judge_paper
    from gkd_lab.claims.run_claims import judge_run
    from gkd_lab.claims.verdicts import encode_verdicts, format_verdict_lines

    asked: Sequence[str] = ()
    if name == "paper":
        if scale is not None or sets:
            raise ConfigError("the paper's own numbers have no --scale and nothing to --set")
        found = judge_paper(CLAIMS.values())
    else:
        grid = load_grid(name, scale, sets, outputs)
        asked = grid.experiment.paper.claims
        found = judge_run(grid, Store(outputs))
    print(
        encode_verdicts(found)
        if format is OutputFormat.json
        else "\n".join(format_verdict_lines(found, asked))
    )


@app.command()
def report(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    output: Annotated[Path | None, typer.Option("-o", help="Default: in the outputs.")] = None,
) -> None:
    """Write one self-contained HTML page: heat map, curves, table, samples."""
    from gkd_lab.report.html_report import write_report

    grid = load_grid(name, scale, sets, outputs)
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
    outputs: OutputsOption = Path("outputs"),
    format: Annotated[OutputFormat, typer.Option(help="Of what is printed.")] = OutputFormat.text,
) -> None:
    """Show how two cells differ: settings, scores, paired difference, the examples that differ most."""
    from gkd_lab.report.comparison import compare_records
    from gkd_lab.report.comparison_text import format_comparison_json, print_comparison
    from gkd_lab.store.lookup import find_record

    check_outputs_folder(outputs)
    pair = find_record(cell_a, outputs), find_record(cell_b, outputs)
    found = compare_records(*pair, evaluation=evaluation, metric=metric)
    if format is OutputFormat.json:
        print(format_comparison_json(found))
    else:
        print_comparison(found)


@app.command()
def rescore(
    name: ExperimentArgument,
    metrics: Annotated[
        str | None, typer.Option(metavar="M1,M2", help="Default: those that the evaluations ask for.")
    ] = None,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Compute metrics anew from the stored predictions of every cell; load no model."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.tables.rescoring import (
        collect_rescore_jobs,
        format_rescored_lines,
        format_unscored_lines,
        rescore_records,
    )

    asked = parse_metric_names(metrics)
    grid = load_grid(name, scale, sets, outputs)
    work, missing = collect_rescore_jobs(grid, Store(outputs), asked)
    if not work:
        exit_with_message(
            f"nothing to rescore: {grid.name} has no finished evaluation below {str(outputs)!r} yet", 1
        )
    try:
        with Reporter().phase(f"{grid.name}: records", len(work)) as advance:
            outcome = rescore_records(work, advance)
    except OSError as error:
        exit_with_message(f"{error}; what was rescored is kept, rescore again to go on", 1)
    print("\n".join(format_rescored_lines(outcome, len(work))))
    for line in format_unscored_lines(grid, outcome, missing):
        print(line, file=sys.stderr)
    if not outcome.is_complete:
        raise typer.Exit(1)


@app.command()
def verify(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Read every record again; report what no longer matches its fingerprint."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.status.verify import list_candidate_records, verify_records

    load_grid(name, scale, sets, outputs)  # what is wrong with the request is said of these outputs
    grid, store = load_grid_without_cache(name, scale, sets, outputs), Store(outputs)
    records = list_candidate_records(grid, store)
    with Reporter().phase(f"{grid.name}: records", len(records)) as advance:
        found = verify_records(grid, store, records, advance)
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
    from gkd_lab.runner.library_logging import silence_libraries
    from gkd_lab.selfcheck.command import run_selfcheck as check

    silence_libraries()
    if not check(teacher, student, bf16=bf16):
        raise typer.Exit(1)


_INTERRUPTED_MESSAGE = "interrupted; run again to go on from the last checkpoint"
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""typer's UsageError: an unknown option or command, a missing or invalid value."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `gkd-lab`: exits with 0, 1 or 2; a traceback only for a bug of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    asked = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        left_with = app(args=asked, prog_name="gkd-lab", standalone_mode=False)
    except ConfigError as error:
        exit_with_message(str(error), 2)
    except _UsageError as error:
        exit_with_message(_format_usage_error(error), 2)
    except DamagedRecord as error:
        exit_with_message(str(error), 1)
    except OSError as error:
        exit_with_message(str(error), 1)
    except KeyboardInterrupt:
        exit_with_message(_INTERRUPTED_MESSAGE, 130)
    except SystemExit as stop:
        if stop.code == SIGNAL_EXIT_BASE + signal.SIGTERM:
            exit_with_message(_INTERRUPTED_MESSAGE, stop.code)
        raise
    if left_with == 130:  # how typer returns from Ctrl-C
        exit_with_message(_INTERRUPTED_MESSAGE, 130)
    sys.exit(left_with or 0)


def _format_usage_error(error: Any) -> str:
    # pydantic checks typer's values and announces its own errors so.
    text = error.format_message().replace("Value error, ", "").rstrip(".")
    command = error.ctx.command_path if error.ctx else "gkd-lab"
    return f"{text}; see `{command} --help`"


if __name__ == "__main__":
    main()
