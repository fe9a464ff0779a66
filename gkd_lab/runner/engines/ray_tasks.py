"""What Ray runs: a queue that outlives the driver, and a task per unit, with a command line as its child.

Ray sends this module by value (see `ray_engine`), so its workers need nothing of gkd_lab in their own Python,
and it imports nothing but the standard library and, in functions, Ray.
"""

import asyncio
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_RETRIES = 3
"""Times that Ray starts a unit again whose process, worker or node died."""
POLL_SECONDS = 0.5
STOP_SECONDS = 60
"""Seconds that a cancelled unit has to save, before it is killed."""
FIRST_SIGNAL_STATUS = 128
"""Above it, the exit status of a process says which signal stopped it."""
IDLE_SECONDS = 300
"""Seconds that a queue without work lives on, so that drivers can read how its jobs ended."""
ENDED_STATES = ("COMPLETED", "FAILED", "KILLED", "CANCELLED", "DROPPED")
_UNLIMITED = 1 << 30


@dataclass(frozen=True)
class TaskRequest:
    """A unit to run: its command line, what it waits for and what it asks of Ray."""

    job: str
    unit: str
    command: tuple[str, ...]
    folder: str
    """Folder in which the command runs."""
    log: str
    environment: Mapping[str, str]
    """Variables beside those of Ray's worker."""
    needs: tuple[str, ...]
    """Jobs that must have succeeded."""
    awaited: tuple[str, ...]
    """Jobs that must have ended."""
    resources: Mapping[str, float]
    """num_cpus, num_gpus and memory in bytes."""


@dataclass
class QueuedJob:
    """A job of the queue and its state."""

    request: TaskRequest
    state: str = "PENDING"
    """PENDING, RUNNING, COMPLETED, FAILED, KILLED, CANCELLED or DROPPED (a job that it needs has failed)."""
    host: str = ""
    result: Any = None
    """Reference to the task's exit status, once Ray has the task."""
    handed_over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once Ray has the task, or never will."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)


def run_command(request: TaskRequest, queue: Any, *statuses: int | None) -> int | None:
    """Run a unit's command line as a child and return its exit status; None, not started, if a need failed.

    statuses: Of the jobs that must have succeeded. The child hears of this worker's end by the end of its
    standard input. Raises ChildProcessError, and Ray tries again, if a signal ended or stopped the child.
    """
    if any(status != 0 for status in statuses):
        return None
    import ray

    host = f"{socket.gethostname()} {ray.util.get_node_ip_address()}"
    queue.note_start.remote(request.job, host)
    names = {"GKD_LAB_HOST": host, "GKD_LAB_JOB": request.job}
    with open(request.log, "ab") as log:
        process = subprocess.Popen(
            request.command,
            cwd=request.folder,
            env={**os.environ, **request.environment, **names},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            status = _wait_with_interrupts(process)
        except BaseException:  # Ray cancels a task by an interrupt
            process.terminate()
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if status < 0 or status > FIRST_SIGNAL_STATUS:
        raise ChildProcessError(f"a signal ended {request.unit} (status {status}); its log is {request.log}")
    return status


def _wait_with_interrupts(process: "subprocess.Popen[bytes]") -> int:
    """Return the exit status of a child. Ray's interrupt is an exception between two waits, not a signal."""
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue


class UnitQueue:
    """Ray actor that holds the jobs of one grid; it lives on when the driver that created it has left."""

    def __init__(self) -> None:
        self._jobs: dict[str, QueuedJob] = {}
        self._slots = asyncio.Semaphore(_UNLIMITED)
        self._is_limited = False
        self._watchers: set[asyncio.Task[None]] = set()

    async def submit(self, requests: Sequence[TaskRequest], max_jobs: int | None) -> None:
        """Submit jobs, each after those it waits for; `max_jobs` run at once, if no earlier job is left."""
        if all(job.ended.is_set() for job in self._jobs.values()):
            self._slots = asyncio.Semaphore(max_jobs or _UNLIMITED)
            self._is_limited = max_jobs is not None
        for request in requests:
            job = self._jobs[request.job] = QueuedJob(request)
            watcher = asyncio.create_task(self._run_job(job))
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)

    async def read_jobs(self) -> list[tuple[str, str, str, str, str]]:
        """Return (job, unit, log, state, host) of every job, in the order of submission."""
        return [
            (name, job.request.unit, job.request.log, job.state, job.host) for name, job in self._jobs.items()
        ]

    async def note_start(self, name: str, host: str) -> None:
        """Note on which machine the child of a job starts."""
        job = self._jobs[name]
        if job.state == "PENDING":
            job.state, job.host = "RUNNING", host

    async def cancel(self, names: Sequence[str]) -> None:
        """Cancel jobs that have not ended; those that run save first."""
        import ray

        for name in names:
            job = self._jobs[name]
            if not job.ended.is_set():
                job.state = "CANCELLED"
                if job.result is not None:
                    ray.cancel(job.result)

    async def _run_job(self, job: QueuedJob) -> None:
        """Hand a job to Ray as soon as it may start, and note its last state."""
        request = job.request
        # Ray itself holds a task back until the results that it needs exist, but it knows no limit of jobs,
        # and a result that is an error ends whatever waits for it.
        for name in (*request.awaited, *(request.needs if self._is_limited else ())):
            await self._jobs[name].ended.wait()
        for name in request.needs:
            await self._jobs[name].handed_over.wait()
        async with self._slots:
            if job.state != "CANCELLED":
                job.result = self._start_task(request)
                job.handed_over.set()
                state = await _wait_for_result(job.result)
                if state != "COMPLETED" and await self._has_failed_need(request):
                    state = "DROPPED"
                job.state = "CANCELLED" if job.state == "CANCELLED" and state != "COMPLETED" else state
        job.handed_over.set()
        job.ended.set()
        asyncio.get_running_loop().call_later(IDLE_SECONDS, self._exit_if_idle, len(self._jobs))

    def _exit_if_idle(self, job_count: int) -> None:
        """End this actor if all jobs have ended and none was submitted since there were `job_count`."""
        import ray

        if len(self._jobs) == job_count and all(job.ended.is_set() for job in self._jobs.values()):
            ray.kill(ray.get_runtime_context().current_actor)

    async def _has_failed_need(self, request: TaskRequest) -> bool:
        """Return whether a job that must have succeeded has not; an error of its task ends this one, too."""
        needs = [self._jobs[name] for name in request.needs]
        for need in needs:
            await need.ended.wait()
        return any(need.state != "COMPLETED" for need in needs)

    def _start_task(self, request: TaskRequest) -> Any:
        """Return the reference to the result of a new task, whose arguments are the results that it needs."""
        import ray

        task = ray.remote(run_command).options(
            **request.resources,
            max_retries=MAX_RETRIES,
            retry_exceptions=[ChildProcessError],
            name=f"unit {request.unit}",
        )
        needed = [self._jobs[name].result for name in request.needs]
        return task.remote(request, ray.get_runtime_context().current_actor, *needed)


async def _wait_for_result(result: Any) -> str:
    """Return the last state of a task: COMPLETED, FAILED, CANCELLED or KILLED."""
    import ray

    try:
        status = await result
    except ray.exceptions.TaskCancelledError:
        return "CANCELLED"
    except ray.exceptions.RayError:
        return "KILLED"
    return "COMPLETED" if status == 0 else "FAILED"
