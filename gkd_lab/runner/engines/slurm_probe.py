"""Probe Slurm before a hundred jobs are queued: commands, controller, partition, request, folder."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd_lab.config import ConfigError
from gkd_lab.config.errors import suggest_choices
from gkd_lab.runner.engines.driver import EngineUnreachable
from gkd_lab.runner.engines.slurm import build_no_slurm_error, run_slurm_command
from gkd_lab.runner.engines.slurm_script import SlurmOptions, list_resource_options, parse_time_limit
from gkd_lab.status.unit_resources import UnitResources
from gkd_lab.store.unit_files import UnitFiles

PROBE_SECONDS = 60
"""Seconds to wait for the probe of a node; on a busy cluster it may wait longer, and so do the units."""
_MISSING_FOLDER, _MISSING_PYTHON = 3, 4
"""Exit statuses of the probe."""


def check_cluster(options: SlurmOptions, requests: Collection[UnitResources]) -> None:
    """Raise ConfigError for missing commands, a silent controller, a wrong partition, a refused request."""
    for program in ("sbatch", "squeue", "scontrol", "sinfo"):
        if shutil.which(program) is None:
            raise build_no_slurm_error(program)
    try:
        partitions = _read_partitions()
    except EngineUnreachable as error:
        raise ConfigError(
            f"--executor slurm: Slurm's controller does not answer ({error}); `scontrol ping` says "
            "whether it is up"
        ) from error
    if options.partition is not None:
        for partition in options.partition.split(","):
            if partition not in partitions:
                choices = suggest_choices(partition, list(partitions))
                raise ConfigError(f"--partition {partition!r}: Slurm has no such partition; {choices}")
    wanted = [p for p in partitions.values() if p.is_default]
    if options.partition is not None:
        wanted = [partitions[name] for name in options.partition.split(",")]
    for resources in requests:
        _check_partition_limits(resources, options, wanted)
        words = [*list_resource_options(resources, options), "--nodes=1", "--ntasks=1", *options.sbatch]
        try:
            run_slurm_command("sbatch", "--test-only", *words, "--wrap=true")
        except ConfigError as error:
            raise ConfigError(
                f"{error} (asked with: {shlex.join(words)}; --partition, --account, --gpus, --mem, --time "
                "and --sbatch change that)"
            ) from error


@dataclass(frozen=True)
class _Partition:
    """A partition, as far as a request may ask for more than it has."""

    name: str
    is_default: bool
    seconds: int | None
    """Largest time limit; None: none."""
    memory: int
    """MiB of its largest node."""
    devices: str
    """Its nodes' devices, as `gpu:4`; `(null)`: none."""


def _read_partitions() -> dict[str, _Partition]:
    """Return name -> partition, of all that this user may see."""
    partitions: dict[str, _Partition] = {}
    for line in run_slurm_command("sinfo", "--noheader", "--format=%P|%l|%m|%G").splitlines():
        name, limit, memory, devices = line.strip().split("|", 3)
        seconds = parse_time_limit(limit) if limit[0].isdecimal() else None
        mebibytes = int("".join(filter(str.isdecimal, memory)) or 0)
        known = partitions.get(name.rstrip("*"))
        if known is not None:  # a line for each kind of nodes
            mebibytes, devices = max(mebibytes, known.memory), f"{known.devices},{devices}"
        partition = _Partition(name.rstrip("*"), name.endswith("*"), seconds, mebibytes, devices)
        partitions[partition.name] = partition
    return partitions


def _check_partition_limits(
    resources: UnitResources, options: SlurmOptions, partitions: Sequence[_Partition]
) -> None:
    """Raise ConfigError for a job that no partition would ever start: many clusters queue it all the same."""
    seconds = resources.seconds if options.time is None else parse_time_limit(options.time)
    limits = [partition.seconds for partition in partitions]
    if seconds is not None and limits and all(limit is not None and limit < seconds for limit in limits):
        largest = max(filter(None, limits))
        names = ", ".join(partition.name for partition in partitions)
        raise ConfigError(
            f"--time: {seconds // 60} minutes are asked for, the partition {names} allows {largest // 60}: "
            f"set --time {largest // 60}; a unit that reaches it saves and goes on in another job"
        )
    if options.gpus and partitions and not any("gpu" in partition.devices for partition in partitions):
        names = ", ".join(partition.name for partition in partitions)
        raise ConfigError(
            f"--gpus {options.gpus}: the partition {names} has no GPU: choose another --partition"
        )


def probe_folder(
    files: UnitFiles, options: SlurmOptions, folder: Path, say: Callable[[str], None], seconds: float
) -> str | None:
    """Check that a node sees the outputs folder and this Python, by a job of its own; ConfigError if not.

    Returns the id of that job if it still waits after `seconds`: all units must then wait for its success.
    """
    token = files.folder.absolute() / f"probe-{os.getpid()}"
    token.touch()
    test = (
        f"[ -f {shlex.quote(str(token))} ] || exit {_MISSING_FOLDER}; "
        f"[ -d {shlex.quote(str(folder))} ] || exit {_MISSING_FOLDER}; "
        f"[ -x {shlex.quote(sys.executable)} ] || exit {_MISSING_PYTHON}"
    )
    resources = UnitResources(2**26, None, is_measured=False)
    small = SlurmOptions(partition=options.partition, account=options.account)
    words = [*list_resource_options(resources, small), *options.sbatch, "--mem=64M", "--time=1"]
    places = ["--chdir=/", "--output=/dev/null", "--job-name=gkd-lab-probe"]
    job = run_slurm_command("sbatch", "--parsable", *words, *places, f"--wrap={test}").strip()
    job = job.partition(";")[0]
    deadline, has_said = time.monotonic() + seconds, False
    while True:
        facts = _read_job(job)
        if facts.get("JobState") not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            break
        if time.monotonic() >= deadline:
            say(
                f"the cluster is busy: the job {job}, which looks whether a node sees {files.folder}, still "
                "waits; the units wait for it"
            )
            return job
        if not has_said:
            say(f"looking whether a node sees {files.folder.absolute()}: job {job}, up to {seconds:.0f} s")
            has_said = True
        time.sleep(0.5)
    token.unlink(missing_ok=True)
    _check_probe(facts, files, folder)
    return None


def _read_job(job: str) -> dict[str, str]:
    """Return what `scontrol show job` says of a job, name -> value."""
    words = run_slurm_command("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _check_probe(facts: dict[str, str], files: UnitFiles, folder: Path) -> None:
    """Raise ConfigError unless the probe has ended well."""
    node, status = facts.get("NodeList", "a node"), facts.get("ExitCode", "").partition(":")[0]
    if facts.get("JobState") == "COMPLETED":
        return
    if status == str(_MISSING_FOLDER):
        raise ConfigError(
            f"--executor slurm: the node {node} does not see {files.folder.absolute()} or {folder}: take a "
            "file system that the nodes share, by --outputs or GKD_LAB_OUTPUTS and a folder to start from"
        )
    if status == str(_MISSING_PYTHON):
        raise ConfigError(
            f"--executor slurm: the node {node} does not see {sys.executable}: install gkd-lab into an "
            "environment on a file system that the nodes share, and run it from there"
        )
    raise ConfigError(
        f"--executor slurm: a first small job ended as {facts.get('JobState')} on {node} (exit status "
        f"{status}): see `scontrol show job {facts.get('JobId')}`"
    )
