"""The batch script of a job array: one unit per task, with signals, requeues and their limit.

It is short and readable on purpose: `gkd-lab run EXP --executor slurm --print` shows it.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd_lab.config import ConfigError
from gkd_lab.config.units import Unit
from gkd_lab.status.unit_resources import UnitResources
from gkd_lab.store.unit_files import UnitFiles

MAX_DEATHS = 3
"""Times that a unit which was killed is requeued."""
DEFAULT_SIGNAL_SECONDS = 120
"""Seconds before the time limit at which the unit hears of it; Slurm may signal half a minute earlier."""


@dataclass(frozen=True)
class SlurmOptions:
    """Options of `--executor slurm`; None: as the unit needs, or as the cluster's defaults say."""

    partition: str | None = None
    account: str | None = None
    gpus: int = 0
    mem: str | None = None
    time: str | None = None
    max_jobs: int | None = None
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, as they are; they come last and so win."""

    def check(self) -> None:
        """Raise ConfigError for a time limit, an amount of memory or a number that Slurm would not read."""
        if self.time is not None:
            parse_time_limit(self.time)
        if self.mem is not None and not re.fullmatch(r"\d+[KMGT]?", self.mem):
            raise ConfigError(f"--mem {self.mem!r}: expected megabytes, or a number with K, M, G or T, as 4G")
        if self.gpus < 0:
            raise ConfigError(f"--gpus {self.gpus}: expected a number of devices from 0")
        if self.max_jobs is not None and self.max_jobs < 1:
            raise ConfigError(f"--max-jobs {self.max_jobs}: expected a number of jobs from 1")


def parse_sbatch_words(text: str | None) -> tuple[str, ...]:
    """Return the options in the text of --sbatch. ConfigError: one that is not written `--name=value`."""
    words = tuple(shlex.split(text or ""))
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"--sbatch {text!r}: {word!r}: expected options as --name=value or --name")
    return words


def parse_memory(text: str | None) -> int | None:
    """Return the bytes of a text such as 4G, as Slurm reads it: megabytes without a unit; None for None."""
    if text is None:
        return None
    unit = text[-1] if text[-1] in "KMGT" else ""
    return int(text.removesuffix(unit)) << {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[unit]


def parse_time_limit(text: str) -> int:
    """Return the seconds of a time limit as Slurm writes it: MINUTES, [DAYS-]H[:M[:S]]. ConfigError else."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--time {text!r}: expected minutes, H:MM:SS or DAYS-H, such as 90, 1:30:00 or 2-0")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class JobArray:
    """Units that wait for the same jobs and ask for the same resources: one call of sbatch."""

    name: str
    units: tuple[Unit, ...]
    resources: UnitResources
    dependency: str = ""
    """Value of `--dependency`, such as `afterok:12_0:12_1`; empty: none."""
    limit: int | None = None
    """Largest number of its tasks that run at once."""


def render_script(
    array: JobArray, options: SlurmOptions, command: Sequence[str], files: UnitFiles, folder: Path
) -> str:
    """Return the batch script of an array.

    command: The command line of a unit, to which `--unit ID` is added. folder: Where it runs.
    """
    directives = _list_directives(array, options, files, folder)
    lines = [f"#SBATCH {directive}" for directive in directives]
    names = [f"  {unit.id}  # {unit.name}" for unit in array.units]
    return _SCRIPT.format(
        directives="\n".join(lines),
        units="\n".join(names),
        folder=shlex.quote(str(files.folder.absolute())),
        command=shlex.join(command),
        max_deaths=MAX_DEATHS,
    )


def _list_directives(array: JobArray, options: SlurmOptions, files: UnitFiles, folder: Path) -> list[str]:
    """Return the options of sbatch in the order in which the script states them."""
    limit = "" if array.limit is None else f"%{array.limit}"
    directives = [
        f"--job-name={array.name}",
        f"--array=0-{len(array.units) - 1}{limit}",
        f"--chdir={shlex.quote(str(folder))}",
        f"--output={shlex.quote(str(files.logs_folder.absolute() / '%A_%a.log'))}",
        *("--open-mode=append", "--requeue", "--nodes=1", "--ntasks=1"),
        *list_resource_options(array.resources, options),
    ]
    if array.dependency:
        directives += [f"--dependency={array.dependency}", "--kill-on-invalid-dep=yes"]
    return [*directives, *options.sbatch]


def list_resource_options(resources: UnitResources, options: SlurmOptions) -> list[str]:
    """Return the options of sbatch on partition, account, devices, memory, time and the signal before it."""
    memory = options.mem
    if memory is None and resources.memory_bytes is not None:
        memory = f"{-(-resources.memory_bytes // 2**20)}M"
    seconds = resources.seconds if options.time is None else parse_time_limit(options.time)
    lead = DEFAULT_SIGNAL_SECONDS if seconds is None else min(DEFAULT_SIGNAL_SECONDS, max(1, seconds // 4))
    values = {
        "--partition": options.partition,
        "--account": options.account,
        "--gres": f"gpu:{options.gpus}" if options.gpus else None,
        "--mem": memory,
        "--time": options.time or (None if seconds is None else str(-(-seconds // 60))),
        "--signal": f"B:USR1@{lead}",
    }
    return [f"{name}={value}" for name, value in values.items() if value is not None]


_SCRIPT = """\
#!/bin/bash
{directives}
# Made by gkd-lab: one unit of work per array task. Started twice, a unit does nothing twice.
units=(
{units}
)
unit=${{units[$SLURM_ARRAY_TASK_ID]}}
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
folder={folder}
progress=$(cat "$folder/progress/$unit" 2>/dev/null)

{command} --unit "$unit" &
pid=$!
trap 'kill -USR1 $pid 2>/dev/null' USR1  # the time limit is near: the unit saves and stops with 138
trap 'kill -TERM $pid 2>/dev/null' TERM  # scancel or a preemption: it saves and stops with 143
until wait $pid; status=$?; [ $status -le 128 ] || ! kill -0 $pid 2>/dev/null; do :; done
wait $pid 2>/dev/null; last=$?  # a trap may have ended the wait, just when the unit ended by itself
[ $last = 127 ] || status=$last

requeue() {{
  echo "gkd-lab: unit $unit ended with $status ($1): requeued"
  scontrol requeue "$job" && exit 0
}}
case $status in
  138) # A unit that gets on between two limits may reach any number of them.
    if [ "$(cat "$folder/progress/$unit" 2>/dev/null)" != "$progress" ]; then
      rm -f "$folder/deaths/$unit-$job"
      requeue "time limit"
    fi ;;
  143) # After scancel or a preemption the job runs no more, and Slurm decides whether it starts again.
    scontrol show job -o "$job" | grep -q JobState=RUNNING || exit 143 ;;
esac
if [ $status -gt 128 ]; then
  echo "$status" >> "$folder/deaths/$unit-$job"
  deaths=$(wc -l < "$folder/deaths/$unit-$job")
  [ "$deaths" -gt {max_deaths} ] || requeue "death $deaths, {max_deaths} allowed"
fi
exit $status
"""
