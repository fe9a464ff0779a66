"""Units of a grid for `plan` and `status`: what each asks a cluster for, and what became of its job."""

from collections.abc import Callable, Collection, Mapping, Sequence

from gkd_lab.config import Grid
from gkd_lab.config.packs import PackLimit, parse_pack_limit
from gkd_lab.config.units import plan_units
from gkd_lab.status.render import Listing
from gkd_lab.status.time_estimates import create_estimator
from gkd_lab.status.unit_resources import (
    EXTRA_SECONDS,
    MEMORY_MARGIN,
    TIME_MARGIN,
    UnitResources,
    estimate_resources,
)
from gkd_lab.store import Store
from gkd_lab.store.unit_files import UnitFiles, UnitJob
from gkd_lab.store.unit_state import read_unit_state

ReadQueue = Callable[[Collection[UnitJob]], Mapping[str, str]]
"""Returns job -> what its engine says of it; a job that the engine has forgotten is missing."""


def list_run_units(grid: Grid, store: Store, read_queue: ReadQueue) -> Listing | None:
    """List the units of a grid that an engine has been given, one a row; None if no engine has any."""
    files = UnitFiles.locate(store.root.absolute(), grid.fingerprint)
    jobs = files.read_jobs()
    limit = files.read_pack_limit()
    if not jobs or limit is None:
        return None
    queue = read_queue([job for job in jobs.values() if job.ended is None])
    rows = []
    for unit in plan_units(grid.cells, parse_pack_limit(limit)):
        job, runs = jobs.get(unit.id), files.read_runs(unit.id)
        rows.append(
            [
                *(unit.id, unit.name, read_unit_state(unit, store)),
                "" if job is None else job.ended or queue.get(job.job, "gone"),
                *("" if job is None else job.job, runs.host, runs.device),
                str(runs.requeues) if runs.starts else "",
                "" if job is None else job.log,
            ]
        )
    columns = ["unit", "work", "status", "queue", "job", "host", "device", "requeues", "log"]
    return Listing(columns, rows)


def list_planned_units(grid: Grid, store: Store, limit: PackLimit) -> tuple[Listing, str]:
    """List the units of a grid with what each needs and asks a cluster for; and a line on these figures."""
    units = plan_units(grid.cells, limit)
    files = UnitFiles.locate(store.root.absolute(), grid.fingerprint)
    statuses = ((cell, store.get_record(cell).read_status()) for cell in grid.cells)
    resources = estimate_resources(units, files, create_estimator(statuses, store, grid.scale))
    rows = [
        [
            *(unit.id, unit.name, read_unit_state(unit, store)),
            ",".join((*unit.needs, *unit.partial_needs)),
            *_format_resources(resources[unit.id]),
        ]
        for unit in units
    ]
    columns = ["unit", "work", "status", "needs", "memory", "time limit", "basis"]
    return Listing(columns, rows), _describe_margins(list(resources.values()))


def _format_resources(resources: UnitResources) -> list[str]:
    """Return texts of memory in MiB, minutes, and the basis of the memory; `default`: of the cluster."""
    memory = resources.memory_bytes
    return [
        "default" if memory is None else f"{memory // 2**20} MiB",
        "default" if resources.seconds is None else f"{resources.seconds // 60} min",
        "" if memory is None else "measured" if resources.is_measured else "estimated",
    ]


def _describe_margins(resources: Sequence[UnitResources]) -> str:
    """Return a line on what the figures hold beside the estimate."""
    measured = sum(unit.is_measured for unit in resources)
    return (
        f"on a cluster: {len(resources)} units; memory of {measured} as measured, of the others from their "
        f"models' sizes, and {MEMORY_MARGIN - 1:.0%} more; time limit {TIME_MARGIN:g} times the estimate and "
        f"{EXTRA_SECONDS // 60} min; --mem and --time replace them"
    )
