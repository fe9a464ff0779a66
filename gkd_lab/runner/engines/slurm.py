"""Slurm as an engine: job arrays with dependencies on single tasks, by its own commands.

What was submitted is found again by the names of its jobs, `EXPERIMENT-GRID-FOLDER-NUMBER`, where FOLDER is a
hash of the outputs folder's path. `scripts/NUMBER.units` has the ids of the units of array NUMBER.
"""

import os
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.units import Unit
from gkd_lab.runner.engines.driver import EngineUnreachable, JobState, name_grid_in_place
from gkd_lab.runner.engines.slurm_script import JobArray, SlurmOptions, render_script
from gkd_lab.status.unit_resources import UnitResources
from gkd_lab.store.files import write_text
from gkd_lab.store.unit_files import UnitFiles, UnitJob

COMMAND_SECONDS = 60
"""Seconds after which a command of Slurm counts as unanswered."""
MAX_ARRAY_SIZE = 1000
"""Units in an array: Slurm's own default limit is 1001."""
_WAITING_STATES = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING"}
_ALIVE_STATES = {
    *(*_WAITING_STATES, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"),
    *("RESIZING", "SIGNALING", "STAGE_OUT", "REQUEUE_FED"),
}
_DROPPED_REASON = "DependencyNeverSatisfied"
"""Reason of a job that Slurm cancels because one that it needs has failed."""


@dataclass(frozen=True)
class SlurmEngine:
    """Slurm, for the units of one grid."""

    grid: Grid
    files: UnitFiles
    options: SlurmOptions
    command: tuple[str, ...]
    """Command line of a unit, to which `--unit ID` is added."""
    resources: Mapping[str, UnitResources]
    folder: Path
    """Folder in which the units run."""
    probe_job: str | None = None
    """Job that looks at a node and has not run yet: everything waits for it."""
    name: str = "Slurm"

    def submit(
        self, units: Sequence[Unit], alive: Mapping[str, UnitJob], open_needs: Mapping[str, Collection[str]]
    ) -> list[UnitJob]:
        """Submit units as job arrays and return their jobs; see `Engine`."""
        first = 1 + max((int(path.stem) for path in self.files.scripts_folder.glob("*.units")), default=0)
        return self._place_units(units, alive, open_needs, self._submit_array, first)

    def render_scripts(self, units: Sequence[Unit], open_needs: Mapping[str, Collection[str]]) -> list[str]:
        """Return the scripts that `submit` would submit, with JOB1, JOB2 for the ids of their jobs."""
        scripts: list[str] = []

        def keep_script(array: JobArray, number: int) -> str:
            """Keep an array's script, and name its job."""
            scripts.append(render_script(array, self.options, self.command, self.files, self.folder))
            return f"JOB{number}"

        self._place_units(units, {}, open_needs, keep_script, 1)
        return scripts

    def find_jobs(self) -> dict[str, UnitJob]:
        """Return unit id -> alive job of this grid in the queue, logged by a driver or not; see `Engine`."""
        jobs: dict[str, UnitJob] = {}
        for job, state, name in _read_queue():
            number = name.removeprefix(self._name_prefix)
            ids_file = self.files.scripts_folder / f"{number}.units"
            if name.startswith(self._name_prefix) and state.is_alive and ids_file.exists():
                array, _, task = job.partition("_")
                ids = ids_file.read_text().split()
                if task.isdecimal() and int(task) < len(ids):
                    unit_id = ids[int(task)]
                    jobs[unit_id] = self._build_job(unit_id, array, int(task))
        return jobs

    def read_states(self, jobs: Collection[UnitJob]) -> dict[str, JobState]:
        """Return job -> state; see `Engine`. Lets a requeued unit start at once: Slurm waits two minutes."""
        if not jobs:
            return {}
        wanted = {job.job: job for job in jobs}
        states = {job: state for job, state, _ in _read_queue() if job in wanted}
        for job, state in states.items():
            if state.place == "BeginTime" and self.files.read_runs(wanted[job].unit).starts:
                with suppress(EngineUnreachable, ConfigError):
                    run_slurm_command("scontrol", "update", f"JobId={job}", "StartTime=now")
        return states

    def describe_cancelling(self, jobs: Collection[UnitJob]) -> str:
        """Return the line that cancels jobs: by their arrays; see `Engine`."""
        arrays = dict.fromkeys(job.job.partition("_")[0] for job in jobs)
        return f"scancel {' '.join(arrays)}"

    def cancel(self, jobs: Collection[UnitJob]) -> None:
        """Cancel jobs; Slurm signals those that run, which save. See `Engine`."""
        run_slurm_command("scancel", *(job.job for job in jobs))

    @cached_property  # read for each job of the queue
    def _name_prefix(self) -> str:
        """Beginning of the names of this grid's jobs in this outputs folder."""
        return f"{name_grid_in_place(self.grid, self.files)}-"

    def _place_units(
        self,
        units: Sequence[Unit],
        alive: Mapping[str, UnitJob],
        open_needs: Mapping[str, Collection[str]],
        submit_array: Callable[[JobArray, int], str],
        first_number: int,
    ) -> list[UnitJob]:
        """Group units into arrays, call `submit_array(array, number)` for each, and return their jobs."""
        jobs = dict(alive)
        arrays = list(_group_units(units, open_needs, self.resources))
        places = _plan_places(arrays, self.options.max_jobs)
        alive_arrays = dict.fromkeys(job.job.partition("_")[0] for job in alive.values())
        array_jobs: dict[int, str] = {-1: ":".join(alive_arrays)}
        submitted = []
        for number, (part, place) in enumerate(zip(arrays, places, strict=True), first_number):
            earlier = ":".join(filter(None, (array_jobs[index] for index in place.after)))
            dependencies = [
                *([] if self.probe_job is None else [f"afterok:{self.probe_job}"]),
                *_list_dependencies(part[0], open_needs, jobs),
                *([f"afterany:{earlier}"] if earlier else []),
            ]
            array = JobArray(
                name=f"{self._name_prefix}{number}",
                units=tuple(part),
                resources=self.resources[part[0].id],
                dependency=",".join(dependencies),
                limit=place.limit,
            )
            array_job = array_jobs[number - first_number] = submit_array(array, number)
            for index, unit in enumerate(part):
                jobs[unit.id] = self._build_job(unit.id, array_job, index)
                submitted.append(jobs[unit.id])
        return submitted

    def _submit_array(self, array: JobArray, number: int) -> str:
        """Write an array's ids and script, submit it and return its job id. Raises ConfigError if refused."""
        script = self.files.scripts_folder / f"{number}.sh"
        write_text(script.with_suffix(".units"), "\n".join(unit.id for unit in array.units) + "\n")
        write_text(script, render_script(array, self.options, self.command, self.files, self.folder))
        return run_slurm_command("sbatch", "--parsable", str(script)).strip().partition(";")[0]

    def _build_job(self, unit_id: str, array_job: str, index: int) -> UnitJob:
        """Return the job of a unit, with the path of its log."""
        log = self.files.logs_folder / f"{array_job}_{index}.log"
        return UnitJob(unit_id, "slurm", f"{array_job}_{index}", str(log))


@dataclass(frozen=True)
class _Place:
    """Place of an array under a limit of jobs over all arrays."""

    limit: int | None
    """Tasks of the array that may run at once; None: any number."""
    after: tuple[int, ...]
    """Indices of the arrays that must have ended before it starts; -1: the jobs that were alive before."""


def _plan_places(arrays: Sequence[Sequence[Unit]], max_jobs: int | None) -> list[_Place]:
    """Return the place of each array, so that at most `max_jobs` tasks run at once.

    Arrays that need none of each other make a stage, which waits for the one before. In a stage they share
    the limit by their sizes; where they are more than the limit, they take turns.
    """
    if max_jobs is None:
        return [_Place(None, ())] * len(arrays)
    stages: dict[int, list[int]] = {}
    levels: dict[str, int] = {}
    for index, units in enumerate(arrays):
        needs = (*units[0].needs, *units[0].partial_needs)
        level = 1 + max((levels[need] for need in needs if need in levels), default=-1)
        levels |= dict.fromkeys((unit.id for unit in units), level)
        stages.setdefault(level, []).append(index)
    places: dict[int, _Place] = {}
    previous: list[int] = [-1]
    for _, stage in sorted(stages.items()):
        lanes = sorted(stage, key=lambda index: -len(arrays[index]))[:max_jobs]
        limits = _share_limit(max_jobs, [len(arrays[index]) for index in lanes])
        last = dict(zip(lanes, lanes, strict=True))
        for lane, limit in zip(lanes, limits, strict=True):
            places[lane] = _Place(limit, tuple(previous))
        for number, index in enumerate(index for index in stage if index not in last):
            lane = lanes[number % len(lanes)]
            places[index] = _Place(limits[number % len(lanes)], (last[lane],))
            last[lane] = index
        previous = list(last.values())
    return [places[index] for index in range(len(arrays))]


def _share_limit(total: int, sizes: Sequence[int]) -> list[int]:
    """Return shares of `total` in proportion to sizes, of which there are no more; each is 1 or more."""
    shares = [max(1, total * size // sum(sizes)) for size in sizes]
    while sum(shares) > total:
        shares[shares.index(max(shares))] -= 1
    while sum(shares) < total:
        shares[min(range(len(sizes)), key=lambda n: shares[n] / sizes[n])] += 1
    return shares


def _group_units(
    units: Sequence[Unit],
    open_needs: Mapping[str, Collection[str]],
    resources: Mapping[str, UnitResources],
) -> Iterator[list[Unit]]:
    """Yield lists of units that wait for the same units and ask for the same, each after what it needs."""
    groups: dict[tuple[object, ...], list[Unit]] = {}
    for unit in units:
        needs = tuple((need, need in unit.needs) for need in open_needs[unit.id])
        groups.setdefault((needs, resources[unit.id]), []).append(unit)
    for group in groups.values():
        for start in range(0, len(group), MAX_ARRAY_SIZE):
            yield group[start : start + MAX_ARRAY_SIZE]


def _list_dependencies(
    unit: Unit, open_needs: Mapping[str, Collection[str]], jobs: Mapping[str, UnitJob]
) -> list[str]:
    """Return dependencies on single tasks: their success for what all cells need, else only their end."""
    kinds: dict[str, list[str]] = {}
    for need in open_needs[unit.id]:
        kinds.setdefault("afterok" if need in unit.needs else "afterany", []).append(jobs[need].job)
    return [":".join([kind, *names]) for kind, names in kinds.items()]


def _read_queue() -> Iterator[tuple[str, JobState, str]]:
    """Yield (job, state, job's name) of this user's jobs that the controller remembers."""
    output = run_slurm_command(
        *("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}"),
        "--format=%i|%T|%r|%N|%j",
    )
    for line in output.splitlines():
        job, text, reason, node, name = line.strip().split("|", 4)
        is_waiting = text in _WAITING_STATES
        yield (
            job,
            JobState(
                text=text,
                is_alive=text in _ALIVE_STATES,
                is_waiting=is_waiting,
                is_cancelled=text.startswith("CANCELLED") and reason != _DROPPED_REASON,
                is_out_of_memory=text == "OUT_OF_MEMORY",
                place=reason if is_waiting else node,
            ),
            name,
        )


def describe_queue(jobs: Collection[UnitJob]) -> dict[str, str]:
    """Return job -> `RUNNING`, or `PENDING (Resources)`; all are `unknown` where Slurm does not answer.

    Jobs that Slurm has forgotten are missing.
    """
    names = {job.job for job in jobs if job.engine == "slurm"}
    if not names:
        return {}
    try:
        queue = [(job, state) for job, state, _ in _read_queue() if job in names]
    except (EngineUnreachable, ConfigError):
        return dict.fromkeys(names, "unknown")
    return {
        job: f"{state.text} ({state.place})" if state.is_waiting and state.place else state.text
        for job, state in queue
    }


def run_slurm_command(*words: str) -> str:
    """Return the standard output of a command of Slurm.

    Raises EngineUnreachable where the controller does not answer, ConfigError where it refuses the request.
    """
    try:
        process = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EngineUnreachable(f"`{words[0]}` took more than {COMMAND_SECONDS} s") from error
    except FileNotFoundError as error:
        raise build_no_slurm_error(words[0]) from error
    if process.returncode:
        message = " ".join(process.stderr.split()) or f"exit status {process.returncode}"
        if any(phrase in message.lower() for phrase in _UNREACHABLE_PHRASES):
            raise EngineUnreachable(message)
        if _UNCONFIGURED_PHRASE in message.lower():
            raise ConfigError(
                f"--executor slurm: `{words[0]}` finds no configuration of a cluster on this machine: run "
                "this on a login node, set SLURM_CONF, or leave out --executor to run here"
            )
        raise ConfigError(f"--executor slurm: {message}")
    return process.stdout


_UNREACHABLE_PHRASES = ("unable to contact", "connection refused", "timed out", "connection failure")
_UNCONFIGURED_PHRASE = "configuration source"


def build_no_slurm_error(program: str) -> ConfigError:
    """Return the error of a machine without Slurm's commands."""
    return ConfigError(
        f"--executor slurm: there is no `{program}` on the PATH: run this on a login node of a Slurm "
        "cluster, or leave out --executor to run here"
    )
