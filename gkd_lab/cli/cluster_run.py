"""`gkd-lab run --executor slurm|ray`: probe the cluster, submit the units, follow them. No torch."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from gkd_lab.cli.exit_status import SIGNAL_EXIT_BASE, exit_with_message
from gkd_lab.cli.options import format_grid_options
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.packs import PackLimit
from gkd_lab.config.units import plan_units
from gkd_lab.runner.engines.driver import Driver, EngineOutcome, EngineUnreachable
from gkd_lab.runner.engines.ray_engine import RayEngine, RayOptions, connect
from gkd_lab.runner.engines.ray_probe import check_ray_cluster
from gkd_lab.runner.engines.slurm import SlurmEngine
from gkd_lab.runner.engines.slurm_probe import PROBE_SECONDS, check_cluster, probe_folder
from gkd_lab.runner.engines.slurm_script import SlurmOptions, parse_memory
from gkd_lab.runner.interrupts import Terminated, handle_signals
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.workers import clear_failures
from gkd_lab.status.render import render_all_done
from gkd_lab.status.time_estimates import create_estimator
from gkd_lab.status.unit_resources import UnitResources, estimate_resources
from gkd_lab.store import Store
from gkd_lab.store.lock import explain_missing_file_locks
from gkd_lab.store.output_folders import create_outputs_folder
from gkd_lab.store.pack_limits import PackLimits
from gkd_lab.store.unit_files import UnitFiles

UNIT_COMMAND = (sys.executable, "-m", "gkd_lab")


@dataclass(frozen=True)
class ClusterRequest:
    """A request to run a grid on a cluster."""

    grid: Grid
    limit: PackLimit
    outputs: Path
    options: SlurmOptions
    words: tuple[str, ...]
    """Command line of a unit after the program: `unit EXP --outputs ...`; `--unit ID` is added."""
    retry_failed: bool = False
    detach: bool = False
    cancel: bool = False
    program: tuple[str, ...] = UNIT_COMMAND
    """Program and first arguments of a unit's command line."""
    poll_seconds: float = 5.0
    probe_seconds: float = PROBE_SECONDS


def build_unit_words(
    name: str,
    scale: str | None,
    sets: Sequence[str] | None,
    outputs: Path,
    pack: str,
    options: Sequence[str],
) -> tuple[str, ...]:
    """Return the command line of a unit after the program, with absolute paths; `options` come last."""
    words = ["unit", name, "--outputs", str(outputs.absolute()), "--pack", pack]
    return (*words, *format_grid_options(scale, sets), *options)


def check_job_options(
    executor: str, options: SlurmOptions, *, detach: bool, cancel: bool, print_only: bool
) -> None:
    """Raise ConfigError for options of jobs that the executor does not take, and for invalid values."""
    if executor == "local" and (options != SlurmOptions() or detach or cancel or print_only):
        raise ConfigError(
            "--partition, --account, --gpus, --mem, --time, --max-jobs, --sbatch, --detach, --cancel and "
            "--print are about jobs of a cluster: add --executor slurm or ray"
        )
    if executor == "ray" and (
        options.partition or options.account or options.time or options.sbatch or print_only
    ):
        raise ConfigError(
            "--partition, --account, --time, --sbatch and --print are about Slurm: --executor ray takes "
            "--gpus, --mem, --max-jobs, --detach and --cancel"
        )
    options.check()


def get_attach_command() -> str:
    """Return the command that follows the jobs again: this process's without options that act once."""
    words = [word for word in sys.argv[1:] if word not in ("--detach", "--retry-failed", "--cancel")]
    return shlex.join(["gkd-lab", *words])


def print_scripts(request: ClusterRequest) -> None:
    """Print the batch scripts of all units that are not finished, and submit nothing."""
    request = replace(
        request, limit=PackLimits(request.outputs).find_grid_limit(request.grid.cells, request.limit)
    )
    driver, engine = _create_driver(request, Store(request.outputs), None)
    scripts = engine.render_scripts(*driver.plan_submission(list(driver.units.values())))
    print("\n".join(scripts) if scripts else f"# {request.grid.name}: nothing is left to submit")


def run_on_slurm(request: ClusterRequest) -> None:
    """Run a grid on Slurm, or cancel its jobs; see `_follow`. Exit 2 if the cluster cannot run it."""
    request, store = _prepare(request)
    driver, engine = _create_driver(request, store, None)
    runnable, _ = driver.plan_submission(list(driver.units.values()))
    if runnable and not request.cancel:
        requests = dict.fromkeys(engine.resources[unit.id] for unit in runnable)
        check_cluster(request.options, requests)
        driver.files.create_folders()
        say = Reporter().say
        probe = probe_folder(driver.files, request.options, engine.folder, say, request.probe_seconds)
        if probe is not None:
            driver, engine = _create_driver(request, store, probe)
    _follow(driver, request)


def run_on_ray(request: ClusterRequest) -> None:
    """Run a grid on Ray, or cancel its jobs; see `_follow`. Exit 2 if the cluster cannot run it."""
    options = request.options
    ray_options = RayOptions(options.gpus, parse_memory(options.mem), options.max_jobs)
    request, store = _prepare(request)
    files = UnitFiles.locate(store.root.absolute(), request.grid.fingerprint)
    engine = RayEngine(
        grid=request.grid,
        files=files,
        options=ray_options,
        command=(*request.program, *request.words),
        resources=_estimate_resources(request, store, files),
        folder=Path.cwd(),
        cancel_command=f"{get_attach_command()} --cancel",
    )
    driver = Driver(request.grid, request.limit, store, engine, Reporter().say, request.poll_seconds)
    runnable, _ = driver.plan_submission(list(driver.units.values()))
    if runnable:
        driver.files.create_folders()
        requests = dict.fromkeys(engine.resources[unit.id] for unit in runnable)
        check_ray_cluster(ray_options, requests, files, engine.folder, request.probe_seconds)
        connect(ray_options.address)
        _follow(driver, request)
    else:
        _finish(request.grid, driver.build_outcome())


def _prepare(request: ClusterRequest) -> tuple[ClusterRequest, Store]:
    """Create the outputs folder; return the request with the limit of its packs, and the folder's store."""
    store = Store(create_outputs_folder(request.outputs))
    # The packs that a first run has found stay, whether it was on this machine or on the cluster.
    limit = PackLimits(store.root).resolve_grid_limit(request.grid.cells, request.limit)
    note = explain_missing_file_locks(store.root)
    if note is not None:
        Reporter().say(note)
    if request.retry_failed:
        clear_failures(request.grid, store)
    return replace(request, limit=limit), store


def _follow(driver: Driver, request: ClusterRequest) -> None:
    """Submit and follow the units of a grid, or cancel them; exit 1 if something failed or was left.

    Ctrl-C and SIGTERM leave the jobs, and say how to attach to them or cancel them.
    """
    grid, engine = request.grid, driver.engine
    try:
        with handle_signals():
            if request.cancel:
                print(f"{grid.name}: {driver.cancel()} jobs cancelled", file=sys.stderr)
                return
            driver.start()
            if request.detach:
                print(f"{grid.name}: {driver.describe_leaving(get_attach_command())}", file=sys.stderr)
                return
            outcome = driver.follow()
    except (KeyboardInterrupt, Terminated) as stop:
        status = stop.code if isinstance(stop, Terminated) else SIGNAL_EXIT_BASE + 2
        assert isinstance(status, int)
        exit_with_message(driver.describe_leaving(get_attach_command()), status)
    except EngineUnreachable as error:
        leaving = driver.describe_leaving(get_attach_command())
        exit_with_message(f"{engine.name} does not answer: {error}; {leaving}", 1)
    _finish(grid, outcome)


def _finish(grid: Grid, outcome: EngineOutcome) -> None:
    """Print what failed or was left of a grid, and exit with 1; or that all is done."""
    for line in outcome.failures:
        print(f"failed: {line}", file=sys.stderr)
    for line in outcome.unfinished:
        print(f"not finished: {line}", file=sys.stderr)
    if outcome.failures or outcome.unfinished:
        raise typer.Exit(1)
    print(render_all_done(grid.name, len(grid.cells)), file=sys.stderr)


def _create_driver(
    request: ClusterRequest, store: Store, probe_job: str | None
) -> tuple[Driver, SlurmEngine]:
    """Return the driver of a request and its engine, with what each unit asks for."""
    grid, files = request.grid, UnitFiles.locate(store.root.absolute(), request.grid.fingerprint)
    engine = SlurmEngine(
        grid=grid,
        files=files,
        options=request.options,
        command=(*request.program, *request.words),
        resources=_estimate_resources(request, store, files),
        folder=Path.cwd(),
        probe_job=probe_job,
    )
    return Driver(grid, request.limit, store, engine, Reporter().say, request.poll_seconds), engine


def _estimate_resources(request: ClusterRequest, store: Store, files: UnitFiles) -> dict[str, UnitResources]:
    """Return unit id -> what it asks a cluster for."""
    grid = request.grid
    statuses = ((cell, store.get_record(cell).read_status()) for cell in grid.cells)
    estimator = create_estimator(statuses, store, grid.scale)
    return estimate_resources(plan_units(grid.cells, request.limit), files, estimator, request.options.gpus)
