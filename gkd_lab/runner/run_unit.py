"""Run one unit of a grid in this process, as an engine's command line asks. No torch until work begins.

Started twice, or beside another process, a unit does nothing twice: locks and records decide. It logs start
and end in the outputs folder, where `status` reads host, device and requeues.
"""

import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.artifact_specs import SftModel, TeacherScoresSpec, TeacherTextSpec
from gkd_lab.config.cell import Reference, Role
from gkd_lab.config.packs import PackLimit
from gkd_lab.config.units import Unit, list_needed_ids, plan_units
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import Store
from gkd_lab.store.unit_files import UnitFiles
from gkd_lab.store.unit_state import (
    get_unit_records,
    is_unit_settled,
    measure_progress,
    read_output_state,
    read_unit_state,
)
from gkd_lab.tables.failure_causes import Failure, format_failures, list_record_failures

Execute = Callable[[Unit], None]
"""Does the work of a unit; failures are in its records."""


def find_unit(grid: Grid, limit: PackLimit, unit_id: str) -> tuple[Unit, dict[str, Unit]]:
    """Return the unit with this id, and all units by id. ConfigError if the grid has none (any more)."""
    units = {unit.id: unit for unit in plan_units(grid.cells, limit)}
    if unit_id not in units:
        raise ConfigError(
            f"--unit {unit_id}: {grid.name} at the scale {grid.scale} has no such unit with --pack {limit}: "
            "the experiment, its data or its models have changed since it was submitted; run it again"
        )
    return units[unit_id], units


def run_unit(unit: Unit, units: Mapping[str, Unit], grid: Grid, store: Store, execute: Execute) -> int:
    """Do a unit's work and return its exit status: 0 when what other units read of it exists, else 1.

    Nothing is loaded for a unit that has nothing left to do. Cells of which a need has failed are left alone,
    with one line on standard error; they are not marked. Failures in the unit's own records are printed too.
    """
    with _log_run(unit, grid, store) as set_status:
        failed_ids = [
            need
            for need in (*unit.needs, *unit.partial_needs)
            if read_output_state(units[need], store) == "failed"
        ]
        for need in failed_ids:
            status_file = get_unit_records(units[need], store)[0].status_file
            print(f"failed: {unit.name}: {units[need].name} has failed (see {status_file})", file=sys.stderr)
        runnable = _drop_cells_with_failed_needs(unit, units, failed_ids)
        if runnable.cells and not set(failed_ids) & set(unit.needs):
            if not is_unit_settled(runnable, store):
                execute(runnable)
            for line in _list_unit_failures(runnable, store):
                print(f"failed: {line}", file=sys.stderr)
        state = read_unit_state(unit, store) if unit.kind == "pack" else read_output_state(unit, store)
        status = 0 if state == "done" else 1
        set_status(status)
    return status


def execute_unit(unit: Unit, options: RunOptions) -> None:
    """Build an artifact and evaluate it, or train and evaluate a pack, as a local run does; loads torch."""
    from gkd_lab.runner.failures import RecordedFailure
    from gkd_lab.runner.run import check_cells, prepare_reference, run_pack
    from gkd_lab.runner.teacher_scores import ensure_teacher_scores
    from gkd_lab.runner.teacher_text import ensure_teacher_text

    cells = list(unit.cells)
    check_cells(cells)
    with suppress(RecordedFailure):
        if isinstance(unit.spec, SftModel):
            role: Role = "teacher" if unit.kind == "teacher" else "start"
            prepare_reference(Reference(role, unit.spec, cells), options)
        elif isinstance(unit.spec, TeacherTextSpec):
            ensure_teacher_text(unit.spec, unit.scale, options)
        elif isinstance(unit.spec, TeacherScoresSpec):
            ensure_teacher_scores(unit.spec, unit.scale, options)
        else:
            run_pack(cells, options)


def _drop_cells_with_failed_needs(unit: Unit, units: Mapping[str, Unit], failed_ids: list[str]) -> Unit:
    """Return a pack without the cells of which a need has failed; an artifact as it is."""
    if unit.kind != "pack" or not failed_ids:
        return unit
    failed = set(failed_ids)
    cells = tuple(cell for cell in unit.cells if not failed.intersection(list_needed_ids(cell, units)))
    return replace(unit, cells=cells)


def _list_unit_failures(unit: Unit, store: Store) -> list[str]:
    """Return a line for each cause of failures in the records of a unit, evaluations included."""
    failures: list[Failure] = []
    is_pack = unit.kind == "pack"
    for record, cell in zip(get_unit_records(unit, store), unit.cells, strict=False):
        if is_pack:
            failures += list_record_failures(record, [cell], store, "cell", cell.folder)
        else:
            failures += list_record_failures(record, unit.cells, store, "model", unit.name)
    return format_failures(failures)


@contextmanager
def _log_run(unit: Unit, grid: Grid, store: Store) -> Iterator[Callable[[int], None]]:
    """Log the start and end of the block in the unit's file; yield a function that sets the exit status.

    A signal that stops the block is logged with its status, and with how far the unit's records are.
    """
    files = UnitFiles.locate(store.root, grid.fingerprint)
    started, status = time.monotonic(), 1
    files.log_run(
        unit.id,
        event="start",
        host=os.environ.get("SLURMD_NODENAME") or os.environ.get("GKD_LAB_HOST") or socket.gethostname(),
        device=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        pid=os.getpid(),
        job=_name_job(),
    )

    def set_status(value: int) -> None:
        """Set the exit status to log."""
        nonlocal status
        status = value

    try:
        yield set_status
    except (SystemExit, KeyboardInterrupt) as stop:
        status = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
        files.write_progress(unit.id, measure_progress(unit, store))
        raise
    finally:
        files.log_run(
            unit.id,
            event="end",
            status=status,
            seconds=round(time.monotonic() - started, 3),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def _name_job() -> str | None:
    """Return the name of the job that this process is in: Slurm's, `12_3` or `12`, or Ray's; None without."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("GKD_LAB_JOB")
