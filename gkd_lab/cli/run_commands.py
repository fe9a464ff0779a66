"""Commands that load models: run, cell, evaluate, export, selfcheck. torch is loaded once work begins."""

import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gkd_lab import experiments
from gkd_lab.cli import cluster_run
from gkd_lab.cli.completion import complete_experiments
from gkd_lab.cli.exit_status import SIGNAL_EXIT_BASE, exit_with_message
from gkd_lab.cli.options import (
    AccountOption,
    BusyCellAction,
    CancelOption,
    CellArgument,
    DetachOption,
    ExecutorOption,
    ExperimentArgument,
    GpusOption,
    MaxJobsOption,
    MemOption,
    NoWaitOption,
    OutputsOption,
    PackOption,
    PartitionOption,
    PrintOption,
    RetryFailedOption,
    SbatchOption,
    ScaleOption,
    SetOption,
    StopWithParentOption,
    TermGradientsOption,
    TimeOption,
    TrackerChoice,
    TrackerOption,
    WorkerOption,
    WorkersOption,
    check_executor_options,
    load_grid,
    parse_cell_fields,
    parse_worker_counts,
)
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.packs import PackLimit, parse_pack_limit
from gkd_lab.runner.engines.slurm_script import SlurmOptions, parse_sbatch_words
from gkd_lab.runner.interrupts import handle_signals
from gkd_lab.runner.workers import stop_with_parent
from gkd_lab.store import Store
from gkd_lab.store.bfloat16 import list_bfloat16_notes
from gkd_lab.store.lock import explain_missing_file_locks
from gkd_lab.store.machine import write_import_seconds
from gkd_lab.store.output_folders import check_outputs_folder, create_outputs_folder
from gkd_lab.store.pack_limits import PackLimits

if TYPE_CHECKING:
    from gkd_lab.runner.run_options import RunOptions


def run_experiment(
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
    partition: PartitionOption = None,
    account: AccountOption = None,
    gpus: GpusOption = 0,
    mem: MemOption = None,
    time: TimeOption = None,
    max_jobs: MaxJobsOption = None,
    sbatch: SbatchOption = None,
    detach: DetachOption = False,
    cancel: CancelOption = False,
    print_only: PrintOption = False,
    worker: WorkerOption = None,
) -> None:
    """Train and evaluate every cell of an experiment; finished work is not repeated."""
    check_executor_options(executor, workers, no_wait)
    slurm_options = SlurmOptions(partition, account, gpus, mem, time, max_jobs, parse_sbatch_words(sbatch))
    if executor == "local" and (slurm_options != SlurmOptions() or detach or cancel or print_only):
        raise ConfigError(
            "--partition, --account, --gpus, --mem, --time, --max-jobs, --sbatch, --detach, --cancel and "
            "--print are about jobs of a cluster: add --executor slurm or ray"
        )
    if executor == "ray" and (partition or account or time or sbatch or print_only):
        raise ConfigError(
            "--partition, --account, --time, --sbatch and --print are about Slurm: --executor ray takes "
            "--gpus, --mem, --max-jobs, --detach and --cancel"
        )
    slurm_options.check()
    limit = parse_pack_limit(pack)
    tracker_name = choose_tracker(tracker)
    if is_sweep_agent() and tracker_name == "wandb":
        raise ConfigError(
            "a sweep agent's run is one cell: let it call `gkd-lab cell`, or set --tracker none"
        )
    grid = load_grid(name, scale, sets, outputs)
    if executor != "local":
        more_words = ["--tracker", tracker_name, *(["--term-gradients"] if term_gradients else [])]
        request = cluster_run.ClusterRequest(
            grid=grid,
            limit=limit,
            outputs=outputs,
            options=slurm_options,
            words=cluster_run.build_unit_words(name, scale, sets or (), outputs, pack, more_words),
            retry_failed=retry_failed,
            detach=detach,
            cancel=cancel,
        )
        if print_only:
            cluster_run.print_scripts(request)
            return
        _print_bfloat16_notes(grid)
        experiments.check_before_run(grid)
        (cluster_run.run_on_slurm if executor == "slurm" else cluster_run.run_on_ray)(request)
        return
    if worker is None:
        _print_bfloat16_notes(grid)
    else:  # its parent has said the notes
        stop_with_parent()
    if workers == 1:
        worker_count, workers_on_gpu = parse_worker_counts(worker)
        run_in_process(
            grid,
            outputs,
            limit,
            retry_failed,
            tracker_name,
            busy_cells="pass" if no_wait else "wait",
            workers=worker_count,
            workers_on_gpu=workers_on_gpu,
            term_gradients=term_gradients,
        )
        return
    arguments = ["run", name, "--outputs", str(outputs), "--pack", pack, "--tracker", tracker_name]
    arguments += [] if scale is None else ["--scale", scale]
    arguments += ["--term-gradients"] if term_gradients else []
    for text in sets or ():
        arguments += ["--set", text]
    run_in_workers(grid, outputs, workers, arguments, retry_failed)


def run_unit(
    name: ExperimentArgument,
    unit_id: Annotated[str, typer.Option("--unit", metavar="ID", help="Id of a unit, as `plan` lists.")],
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    pack: PackOption = "auto",
    tracker: TrackerOption = None,
    term_gradients: TermGradientsOption = False,
    with_parent: StopWithParentOption = False,
) -> None:
    """Run one unit of an experiment, as a job of a cluster does: an artifact, or a pack of cells.

    The status is 0 once what other units need of it exists. SIGTERM and SIGUSR1 save and stop: 143 and 138.
    """
    from gkd_lab.runner import run_unit as units

    limit, tracker_name = parse_pack_limit(pack), tracker or "none"
    with handle_signals(is_job=True):
        if with_parent:
            stop_with_parent()
        grid = load_grid(name, scale, sets, outputs)
        kept_limit = PackLimits(outputs).find_grid_limit(grid.cells, limit)
        unit, units_by_id = units.find_unit(grid, kept_limit, unit_id)
        store = Store(create_outputs_folder(outputs))

        def execute(part: units.Unit) -> None:
            """Do the work of a unit, or of the cells of a pack that can be run."""
            options = _create_unit_options(grid, outputs, limit, tracker_name, term_gradients)
            units.execute_unit(part, options)

        try:
            status = units.run_unit(unit, units_by_id, grid, store, execute)
        except OSError as error:
            exit_with_message(f"{error}; what was finished is kept, run again to go on", 1)
    if status:
        raise typer.Exit(status)


def _create_unit_options(
    grid: Grid, outputs: Path, limit: PackLimit, tracker: TrackerChoice, term_gradients: bool
) -> "RunOptions":
    """Return the options of a unit, with the libraries loaded and silenced."""
    from gkd_lab.runner.progress import Reporter, silence_libraries
    from gkd_lab.runner.run_options import RunOptions
    from gkd_lab.runner.trackers import create_tracker

    silence_libraries()
    gc.freeze()  # the collections between trainings skip the objects of the libraries
    reporter = Reporter()
    return RunOptions(
        outputs,
        pack=limit,
        reporter=reporter,
        tracker=create_tracker(tracker, grid.name, outputs, reporter),
        busy_cells="wait",
        term_gradients=term_gradients,
    )


def run_cell(
    context: typer.Context,
    experiment: Annotated[
        str | None,
        typer.Option(
            metavar="EXP",
            help="Experiment that gives base, scale and evaluations.",
            autocompletion=complete_experiments,
        ),
    ] = None,
    scale: ScaleOption = None,
    outputs: OutputsOption = Path("outputs"),
    retry_failed: RetryFailedOption = False,
    tracker: TrackerOption = None,
    held: Annotated[
        BusyCellAction,
        typer.Option(help="If another process works on the cell: wait for it, or pass it over."),
    ] = "wait",
) -> None:
    """Train and evaluate one cell given by its fields, as a sweep agent does; print its folder."""
    tracker_name = choose_tracker(tracker)
    try:
        check_outputs_folder(outputs)
        fields = parse_cell_fields(context.args)
        grid = experiments.load_single_cell(fields, name=experiment, scale=scale, outputs=outputs)
    except ConfigError as error:
        if is_sweep_agent() and tracker_name == "wandb":
            from gkd_lab.runner.wandb_tracker import report_refused_parameters

            report_refused_parameters(str(error))
        raise
    _print_bfloat16_notes(grid)
    run_in_process(grid, outputs, "off", retry_failed, tracker_name, busy_cells=held)
    print(Store(outputs).get_record(grid.cells[0]).folder)


def _print_bfloat16_notes(grid: Grid) -> None:
    """Print notes on cells whose bf16 this machine computes slowly, to standard error."""
    for note in list_bfloat16_notes(grid.cells):
        print(note, file=sys.stderr)


def evaluate_cell(
    cell: CellArgument,
    tasks: Annotated[
        str,
        typer.Option(metavar="NAME,FILE.yaml", help="Tasks of lm-eval; `own`: the task of the cell."),
    ],
    outputs: OutputsOption = Path("outputs"),
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task; default: all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Default: as each task defines.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents per batch.")] = 16,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let task files run their Python code.")
    ] = False,
) -> None:
    """Run tasks of lm-eval on a finished cell and print the scores, which `table` shows too."""
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
    from gkd_lab.runner.lm_eval_runs import evaluate_record
    from gkd_lab.runner.progress import silence_libraries
    from gkd_lab.runner.run_options import RunOptions

    silence_libraries()
    evaluations = evaluate_record(
        record,
        names,
        RunOptions(outputs),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        trusted=trust_remote_code,
    )
    failures = [result for result in evaluations if result.record.read_state() == "failed"]
    for result in evaluations:
        if result not in failures:
            for metric, score in result.record.read_scores().items():
                print(f"{result.evaluation.name}/{metric}: {_format_score(score)}")
    for result in failures:
        reason = f"{result.record.read_status()['error']} (see {result.record.status_file})"
        print(f"failed: {result.evaluation.name}: {reason}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def _format_score(score: dict[str, Any]) -> str:
    """Return a score as `0.1234 [0.1000, 0.1500]`, or without interval; `no number` for null."""
    value = "no number" if score["value"] is None else f"{score['value']:.4f}"
    return f"{value} [{score['low']:.4f}, {score['high']:.4f}]" if "low" in score else value


def export_cell(
    cell: CellArgument,
    output: Annotated[Path, typer.Option("-o", help="New folder to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge a LoRA adapter into the weights: a plain model.")
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint that scored best on validation rows.")
    ] = False,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Write a finished cell's student and tokenizer into a folder for transformers or peft.

    A student with LoRA is written as an adapter that names its base, or with --merged as a plain model.
    """
    from gkd_lab.store.lookup import find_record

    check_outputs_folder(outputs)
    record = find_record(cell, outputs)
    from gkd_lab.runner.progress import silence_libraries
    from gkd_lab.runner.student_files import export_record

    silence_libraries()
    content = export_record(record, output, merged=merged, is_best=best)
    print(f"{output}: {content}")


def check_model_pair(
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub name. Default: a small random model.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or hub name. Default: a small random model.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Also compare with bfloat16.")] = False,
) -> None:
    """Check invariances of the losses and of sampling on a pair of models; train nothing.

    No file is written. The status is 1 if a check fails.
    """
    from gkd_lab.runner.progress import silence_libraries
    from gkd_lab.selfcheck.command import run_selfcheck

    silence_libraries()
    if not run_selfcheck(teacher, student, bf16=bf16):
        raise typer.Exit(1)


@handle_signals()
def run_in_process(
    grid: Grid,
    outputs: Path,
    limit: PackLimit,
    retry_failed: bool,
    tracker: TrackerChoice,
    *,
    busy_cells: BusyCellAction,
    workers: int = 1,
    workers_on_gpu: int = 1,
    term_gradients: bool = False,
) -> None:
    """Train and evaluate a grid's unfinished cells in this process; exit 1 if some failed or are busy.

    For a sweep agent a busy cell is no failure. workers: Number of processes that share this run.
    workers_on_gpu: Those of them that share this process's GPU.
    """
    store = Store(create_outputs_folder(outputs))
    if not retry_failed and _is_grid_done(grid, store):
        if tracker == "wandb" and is_sweep_agent():
            _replay_to_sweep_agent(grid, store)
        print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)
        return
    _check_grid(grid)
    if workers == 1:  # else the parent of the workers has said it
        _print_work_ahead(grid, store, limit)
    started = time.monotonic()
    from gkd_lab.runner.progress import Reporter, silence_libraries
    from gkd_lab.runner.run import run_grid
    from gkd_lab.runner.run_options import RunOptions
    from gkd_lab.runner.trackers import create_tracker

    reporter = Reporter()
    options = RunOptions(
        outputs,
        pack=limit,
        retry_failed=retry_failed,
        reporter=reporter,
        tracker=create_tracker(tracker, grid.name, outputs, reporter),
        busy_cells=busy_cells,
        workers=workers,
        workers_on_gpu=workers_on_gpu,
        term_gradients=term_gradients,
    )
    silence_libraries()
    if workers == 1:
        write_import_seconds(outputs, time.monotonic() - started)
    gc.freeze()  # the collections between trainings skip the objects of the libraries
    try:
        outcome = run_grid(grid, options)
    except OSError as error:
        exit_with_message(f"{error}; what was finished is kept, run again to go on", 1)
    for line in outcome.failures:
        print(f"failed: {line}", file=sys.stderr)
    if outcome.busy_cell_count:
        print(f"{outcome.busy_cell_count} cells are being run by another process", file=sys.stderr)
    # For a sweep agent a busy cell is no failure: three failures would stop the agent.
    if outcome.failures or (outcome.busy_cell_count and not is_sweep_agent()):
        raise typer.Exit(1)
    if outcome.busy_cell_count or workers > 1:
        return
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def run_in_workers(
    grid: Grid, outputs: Path, count: int, arguments: Sequence[str], retry_failed: bool
) -> None:
    """Run a grid in `count` child processes; exit with their status unless all cells are done.

    arguments: Command line of each child. retry_failed: Delete stored failures first.
    """
    from gkd_lab.runner.devices import list_gpus
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.workers import FAILURE_PREFIX, WorkerPool, clear_failures
    from gkd_lab.tables.failure_causes import format_failures, list_failures

    store = Store(create_outputs_folder(outputs))
    if note := explain_missing_file_locks(store.root):
        print(note, file=sys.stderr)
    if retry_failed:
        clear_failures(grid, store)
    if not _is_grid_done(grid, store):
        _check_grid(grid)
        _print_work_ahead(grid, store, "auto")
        if any(cell.training.tf32 for cell in grid.cells):
            from gkd_lab.runner.tf32 import check_tf32

            check_tf32(cell.training for cell in grid.cells)  # once, instead of in each worker
        reporter, gpus = Reporter(), list_gpus()
        if gpus:
            reporter.say(f"{count} workers on GPU{'s' if len(gpus) > 1 else ''} {', '.join(gpus)}")
        pool = WorkerPool(count, [sys.executable, "-m", "gkd_lab", *arguments], reporter.say, gpus)
        status = pool.wait()
        if pool.failures:  # each worker's lines name its own cells
            for line in format_failures(list_failures(grid, store)):
                print(f"{FAILURE_PREFIX}{line}", file=sys.stderr)
        if status == SIGNAL_EXIT_BASE + signal.SIGINT:
            raise KeyboardInterrupt
        if status > SIGNAL_EXIT_BASE:
            raise SystemExit(status)
        # The other workers finish the cells of a killed one.
        if status and not _is_grid_done(grid, store):
            raise typer.Exit(status)
    print(f"{grid.name}: all {len(grid.cells)} cells are done", file=sys.stderr)


def _print_work_ahead(grid: Grid, store: Store, limit: PackLimit) -> None:
    """Print how much of a grid is to be done, and that the libraries are being loaded, to standard error."""
    from gkd_lab.status.overview import build_overview
    from gkd_lab.status.render import render_state_counts

    overview = build_overview(grid, store, limit)
    print(f"{grid.name}: {render_state_counts(overview)}", file=sys.stderr)
    print(f"{grid.name}: loading torch and the libraries", file=sys.stderr, flush=True)


def _check_grid(grid: Grid) -> None:
    """Raise ConfigError for models, splits, packages or rewards that would make a grid's cells fail."""
    experiments.check_models_and_splits(grid)
    experiments.check_peft(grid)
    experiments.check_generators_and_rewards(grid)


def _replay_to_sweep_agent(grid: Grid, store: Store) -> None:
    """Log the stored metrics of a grid's finished cells into the wandb agent's run; train nothing."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.runner.trackers import create_tracker, replay_records

    reporter = Reporter()
    replay_records(grid, store, create_tracker("wandb", grid.name, store.root, reporter))


def choose_tracker(choice: TrackerChoice | None) -> TrackerChoice:
    """Return the chosen tracker; without a choice `wandb` under a sweep agent, else `none`."""
    return choice or ("wandb" if is_sweep_agent() else "none")


def is_sweep_agent() -> bool:
    """Return whether a wandb sweep agent started this process: WANDB_SWEEP_ID is set."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _is_grid_done(grid: Grid, store: Store) -> bool:
    """Return whether all cells, with their evaluations, and all reference models are done."""
    from gkd_lab.tables.rows import build_table_rows

    return all(row["status"] == "done" for row in build_table_rows(grid, store))
