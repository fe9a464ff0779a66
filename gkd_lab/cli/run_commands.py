"""Commands that train: run, unit, cell. torch is loaded once work begins."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gkd_lab import experiments
from gkd_lab.cli import cluster_run
from gkd_lab.cli.completion import complete_experiments
from gkd_lab.cli.exit_status import exit_with_message
from gkd_lab.cli.local_run import (
    choose_tracker,
    is_sweep_agent,
    print_bfloat16_notes,
    run_in_process,
    run_in_workers,
)
from gkd_lab.cli.options import (
    AccountOption,
    BusyCellAction,
    CancelOption,
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
    format_grid_options,
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
    job_options = SlurmOptions(partition, account, gpus, mem, time, max_jobs, parse_sbatch_words(sbatch))
    cluster_run.check_job_options(executor, job_options, detach=detach, cancel=cancel, print_only=print_only)
    limit = parse_pack_limit(pack)
    tracker_name = choose_tracker(tracker)
    if is_sweep_agent() and tracker_name == "wandb":
        raise ConfigError(
            "a sweep agent's run is one cell: let it call `gkd-lab cell`, or set --tracker none"
        )
    grid = load_grid(name, scale, sets, outputs)
    logging_words = ["--tracker", tracker_name, *(["--term-gradients"] if term_gradients else [])]
    if executor != "local":
        request = cluster_run.ClusterRequest(
            grid=grid,
            limit=limit,
            outputs=outputs,
            options=job_options,
            words=cluster_run.build_unit_words(name, scale, sets, outputs, pack, logging_words),
            retry_failed=retry_failed,
            detach=detach,
            cancel=cancel,
        )
        _run_on_cluster(request, executor, print_only=print_only)
        return
    if worker is None:
        print_bfloat16_notes(grid)
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
    words = ["run", name, "--outputs", str(outputs), "--pack", pack]
    words += [*format_grid_options(scale, sets), *logging_words]
    run_in_workers(grid, outputs, workers, words, retry_failed)


def _run_on_cluster(request: cluster_run.ClusterRequest, executor: str, *, print_only: bool) -> None:
    """Run a grid on Slurm or Ray, or only print its batch scripts."""
    if print_only:
        cluster_run.print_scripts(request)
        return
    print_bfloat16_notes(request.grid)
    experiments.check_before_run(request.grid)
    run_grid = cluster_run.run_on_slurm if executor == "slurm" else cluster_run.run_on_ray
    run_grid(request)


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
        grid_limit = PackLimits(outputs).find_grid_limit(grid.cells, limit)
        unit, units_by_id = units.find_unit(grid, grid_limit, unit_id)
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
    print_bfloat16_notes(grid)
    run_in_process(grid, outputs, "off", retry_failed, tracker_name, busy_cells=held)
    print(Store(outputs).get_record(grid.cells[0]).folder)
