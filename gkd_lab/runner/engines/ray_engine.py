"""Ray as an engine: a task per unit with what it needs as references, in a queue that outlives the driver.

Not Ray Tune: its identity and its resuming would compete with the records. Ray pickles the arguments of its
tasks, which are strings and numbers here; what a task does is a command line.
"""

import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_lab.config import Grid
from gkd_lab.config.units import Unit
from gkd_lab.runner.engines import ray_tasks
from gkd_lab.runner.engines.driver import EngineUnreachable, JobState, name_grid_in_place
from gkd_lab.runner.engines.ray_tasks import ENDED_STATES, TaskRequest, UnitQueue
from gkd_lab.status.unit_resources import UnitResources
from gkd_lab.store.unit_files import UnitFiles, UnitJob

NAMESPACE = "gkd-lab"
HEAD_RESOURCE = "node:__internal_head__"
"""Resource that only the head node has: the queue is lost with the cluster alone."""
ANSWER_SECONDS = 60
"""Seconds after which a question to Ray counts as unanswered."""
_PASSED_PREFIXES = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_")
_SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


@dataclass(frozen=True)
class RayOptions:
    """Options of `--executor ray`; None: as the unit needs."""

    gpus: float = 0
    memory_bytes: int | None = None
    max_jobs: int | None = None
    address: str = "auto"
    """Address of the cluster; `auto`: that of RAY_ADDRESS, or the cluster that this machine belongs to."""


@dataclass(frozen=True)
class RayEngine:
    """Ray, for the units of one grid; `connect` first."""

    grid: Grid
    files: UnitFiles
    options: RayOptions
    command: tuple[str, ...]
    """Command line of a unit, to which `--unit ID` is added."""
    resources: Mapping[str, UnitResources]
    folder: Path
    """Folder in which the units run."""
    cancel_command: str
    """Line that cancels the jobs of the grid."""
    name: str = "Ray"

    def submit(
        self, units: Sequence[Unit], alive: Mapping[str, UnitJob], open_needs: Mapping[str, Collection[str]]
    ) -> list[UnitJob]:
        """Submit units as tasks and return their jobs; see `Engine`."""
        jobs = dict(alive)
        submitted, requests = [], []
        for unit in units:
            job = self._build_job(unit.id)
            requests.append(self._build_request(unit, job, jobs, open_needs[unit.id]))
            jobs[unit.id] = job
            submitted.append(job)
        with _report_silence():
            queue = _find_queue(self._queue_name) or self._create_queue()
            _ask(queue.submit.remote(requests, self.options.max_jobs))
        return submitted

    def find_jobs(self) -> dict[str, UnitJob]:
        """Return unit id -> alive job of this grid in the queue; see `Engine`."""
        return {
            unit: UnitJob(unit, "ray", job, log)
            for job, unit, log, state, _ in read_queue(self._queue_name)
            if state not in ENDED_STATES
        }

    def read_states(self, jobs: Collection[UnitJob]) -> dict[str, JobState]:
        """Return job -> state; see `Engine`. The jobs of a queue whose machine was lost are missing."""
        wanted = {job.job for job in jobs}
        return {
            job: JobState(
                text=state,
                is_alive=state not in ENDED_STATES,
                is_waiting=state == "PENDING",
                is_cancelled=state == "CANCELLED",
                place=host,
            )
            for job, _, _, state, host in (read_queue(self._queue_name) if wanted else [])
            if job in wanted
        }

    def describe_cancelling(self, jobs: Collection[UnitJob]) -> str:
        """Return the line that cancels jobs: a command of gkd-lab, as Ray has none; see `Engine`."""
        return self.cancel_command

    def cancel(self, jobs: Collection[UnitJob]) -> None:
        """Cancel jobs; those that run save first."""
        with _report_silence():
            queue = _find_queue(self._queue_name)
            if queue is not None:
                _ask(queue.cancel.remote([job.job for job in jobs]))

    @property
    def _queue_name(self) -> str:
        """Name of this grid's queue among Ray's actors."""
        return name_grid_in_place(self.grid, self.files)

    def _build_job(self, unit_id: str) -> UnitJob:
        """Return a new job of a unit, with the path of its log."""
        job = f"ray-{secrets.token_hex(4)}"
        return UnitJob(unit_id, "ray", job, str(self.files.logs_folder.absolute() / f"{job}.log"))

    def _build_request(
        self, unit: Unit, job: UnitJob, jobs: Mapping[str, UnitJob], open_needs: Collection[str]
    ) -> TaskRequest:
        """Return the request of a unit: command line, resources, and the jobs that it waits for."""
        memory = self.options.memory_bytes or self.resources[unit.id].memory_bytes
        resources = {"num_cpus": 1.0, "num_gpus": float(self.options.gpus)}
        return TaskRequest(
            job=job.job,
            unit=unit.id,
            command=(*self.command, "--unit", unit.id, "--stop-with-parent"),
            folder=str(self.folder),
            log=job.log,
            environment=list_passed_variables(),
            needs=tuple(jobs[need].job for need in open_needs if need in unit.needs),
            awaited=tuple(jobs[need].job for need in open_needs if need not in unit.needs),
            resources=resources if memory is None else {**resources, "memory": float(memory)},
        )

    def _create_queue(self) -> Any:
        """Create this grid's queue, which lives on when this process ends; return its handle."""
        return (
            _get_ray()
            .remote(UnitQueue)
            .options(
                name=self._queue_name,
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                resources={HEAD_RESOURCE: 0.001},
                max_concurrency=100,
            )
            .remote()
        )


def connect(address: str) -> None:
    """Connect this process to a cluster, unless it is connected. Raises EngineUnreachable."""
    ray = _get_ray()
    if not ray.is_initialized():
        with _report_silence():
            ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(ray_tasks)


def read_queue(name: str) -> list[tuple[str, str, str, str, str]]:
    """Return (job, unit, log, state, host) of a queue's jobs; empty without the queue. `connect` first."""
    with _report_silence():
        queue = _find_queue(name)
        if queue is None:
            return []
        try:
            rows: list[tuple[str, str, str, str, str]] = _ask(queue.read_jobs.remote())
        except _get_ray().exceptions.RayActorError:  # its machine was lost, and the jobs with it
            return []
        return rows


def _find_queue(name: str) -> Any:
    """Return the handle of the queue of this name; None if there is none."""
    try:
        return _get_ray().get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def list_passed_variables() -> dict[str, str]:
    """Return the variables of this process that units need too: of Hugging Face, threads and PYTHONPATH.

    No token or key is among them: what Ray is given, its dashboard may show.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(_PASSED_PREFIXES) or name == "PYTHONPATH")
        and not any(word in name for word in _SECRET_WORDS)
    }


def _get_ray() -> Any:
    """Return the package ray, which is imported when it is needed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def _ask(reference: Any) -> Any:
    """Return the value of a reference. Raises Ray's errors, also for an answer that takes too long."""
    return _get_ray().get(reference, timeout=ANSWER_SECONDS)


@contextmanager
def _report_silence() -> Iterator[None]:
    """Raise EngineUnreachable for an error in the block that says that Ray does not answer."""
    try:
        yield
    except (ConnectionError, TimeoutError) as error:  # Ray's own are among them
        raise EngineUnreachable(" ".join(str(error).split()) or type(error).__name__) from error
