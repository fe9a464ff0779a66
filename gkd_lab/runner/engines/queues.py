"""What the engines say of jobs that have not ended, for `plan` and `status`.

Ray is asked in a process of its own, `python -m gkd_lab.runner.engines.queues NAME`: it may wait minutes
for a cluster that is gone.
"""

import json
import subprocess
import sys
from collections.abc import Collection

from gkd_lab.runner.engines.ray_engine import RayOptions, connect, read_queue
from gkd_lab.runner.engines.slurm import describe_queue
from gkd_lab.store.unit_files import UnitJob

ANSWER_SECONDS = 30
"""Seconds after which Ray's answer is no longer waited for."""


def describe_queues(jobs: Collection[UnitJob], ray_queue: str) -> dict[str, str]:
    """Return job -> state in the words of its engine; `unknown` where the engine does not answer.

    Jobs that their engine has forgotten are missing. ray_queue: Name of the grid's queue on Ray.
    """
    states = describe_queue(jobs)
    ray_jobs = {job.job for job in jobs if job.engine == "ray"}
    return {**states, **_describe_ray_queue(ray_jobs, ray_queue)} if ray_jobs else states


def _describe_ray_queue(jobs: Collection[str], name: str) -> dict[str, str]:
    """Return job -> state of jobs on Ray; see `describe_queues`."""
    command = [sys.executable, "-m", "gkd_lab.runner.engines.queues", name]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
        states: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return dict.fromkeys(jobs, "unknown")
    return {job: state for job, state in states.items() if job in jobs}


def main() -> None:
    """Print job -> state of the queue on Ray that the command line names, as JSON."""
    connect(RayOptions().address)
    print(json.dumps({job: state for job, _, _, state, _ in read_queue(sys.argv[1])}))


if __name__ == "__main__":
    main()
