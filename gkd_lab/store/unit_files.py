"""Files of the units of a grid that an engine runs: jobs, starts and ends, logs and scripts.

    outputs/.units/<grid fingerprint>/
        pack                   the limit of packs by which the units were made
        jobs.jsonl             a row per job: unit, engine, job id, log; a row when the driver sees it ended
        runs/<unit>.jsonl      a row per start and end, which the unit's own process appends
        progress/<unit>        how far the unit's records were when a signal stopped it
        deaths/<unit>-<job>    a line per death after which the job was requeued
        scripts/  logs/

Nothing here decides what is done: that is in the records.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd_lab.config.packs import PackLimit
from gkd_lab.store.files import append_json_line, read_json_lines, write_text

UNITS_FOLDER = ".units"


@dataclass(frozen=True)
class UnitJob:
    """A job of an engine that runs one unit."""

    unit: str
    engine: str
    job: str
    """The engine's name for it, for Slurm `123_4`."""
    log: str
    """Path of the file with the unit's output."""
    ended: str | None = None
    """The engine's last state of a job that has ended, such as CANCELLED; None until a driver has seen it."""


@dataclass(frozen=True)
class UnitRuns:
    """What the processes of one unit have logged."""

    starts: int = 0
    host: str = ""
    device: str = ""
    is_running: bool = False
    """Whether the last process that started has logged no end; it may have been killed."""
    status: int | None = None
    """Exit status of the last process, if it has logged its end."""
    seconds: float | None = None
    """Of the last process that ended."""
    peak_bytes: int | None = None
    """Memory of the largest process that ended."""

    @property
    def requeues(self) -> int:
        """Number of starts after the first."""
        return max(0, self.starts - 1)


@dataclass(frozen=True)
class UnitFiles:
    """The files of one grid's units; `folder` may not exist yet."""

    folder: Path

    @classmethod
    def locate(cls, outputs: Path, grid_fingerprint: str) -> "UnitFiles":
        """Return the files of a grid's units below an outputs folder."""
        return cls(outputs / UNITS_FOLDER / grid_fingerprint)

    @property
    def jobs_file(self) -> Path:
        """Path of the list of jobs."""
        return self.folder / "jobs.jsonl"

    @property
    def scripts_folder(self) -> Path:
        """Folder of the scripts that were submitted."""
        return self.folder / "scripts"

    @property
    def logs_folder(self) -> Path:
        """Folder of the logs, one for each unit of each submission."""
        return self.folder / "logs"

    @property
    def progress_folder(self) -> Path:
        """Folder of a file per unit that a signal has stopped."""
        return self.folder / "progress"

    @property
    def deaths_folder(self) -> Path:
        """Folder of a file per unit and job that was killed."""
        return self.folder / "deaths"

    def create_folders(self) -> None:
        """Create the folders that scripts and units write to."""
        for name in ("runs", "progress", "deaths", "scripts", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def write_pack_limit(self, limit: PackLimit) -> None:
        """Write the limit by which the grid's cells were grouped when its units were submitted."""
        write_text(self.folder / "pack", f"{limit}\n")

    def read_pack_limit(self) -> str | None:
        """Return the text of that limit, as `--pack` takes it; None before a submission."""
        path = self.folder / "pack"
        return path.read_text().strip() if path.exists() else None

    def log_jobs(self, jobs: Iterable[UnitJob]) -> None:
        """Append a row per submitted job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"unit": job.unit, "engine": job.engine, "job": job.job, "log": job.log, "time": time.time()}
            for job in jobs
        ]
        for row in rows:
            append_json_line(self.jobs_file, row)

    def log_end(self, job: UnitJob, state: str) -> None:
        """Append that the engine has ended a job, and its last state there."""
        append_json_line(self.jobs_file, {"unit": job.unit, "job": job.job, "ended": state})

    def read_jobs(self) -> dict[str, UnitJob]:
        """Return unit id -> its newest job; a job without a state has not been seen to end."""
        jobs: dict[str, UnitJob] = {}
        for row in read_json_lines(self.jobs_file):
            if "ended" not in row:
                jobs[row["unit"]] = UnitJob(row["unit"], row["engine"], row["job"], row["log"])
            elif row["unit"] in jobs and jobs[row["unit"]].job == row["job"]:
                job = jobs[row["unit"]]
                jobs[job.unit] = UnitJob(job.unit, job.engine, job.job, job.log, str(row["ended"]))
        return jobs

    def log_run(self, unit_id: str, **facts: Any) -> None:
        """Append a row on a start or an end of a unit's process, with the present time."""
        path = self._get_runs_file(unit_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(path, {**facts, "time": round(time.time(), 3)})

    def read_runs(self, unit_id: str) -> UnitRuns:
        """Return what a unit's processes have logged; nothing if none has started."""
        rows = read_json_lines(self._get_runs_file(unit_id))
        starts = [row for row in rows if row.get("event") == "start"]
        if not starts:
            return UnitRuns()
        ends = [row for row in rows if row.get("event") == "end"]
        return UnitRuns(
            starts=len(starts),
            host=str(starts[-1].get("host", "")),
            device=str(starts[-1].get("device", "")),
            is_running=rows[-1].get("event") == "start",
            status=rows[-1].get("status"),
            seconds=_get_last(ends, "seconds"),
            peak_bytes=max((row["peak_bytes"] for row in ends if "peak_bytes" in row), default=None),
        )

    def count_deaths(self, job: UnitJob) -> int:
        """Return how often a job was killed, as its script has counted, which requeues it a few times."""
        path = self.deaths_folder / f"{job.unit}-{job.job}"
        return len(path.read_text().split()) if path.exists() else 0

    def write_progress(self, unit_id: str, progress: int) -> None:
        """Write how far a unit is, for the script that decides whether it may start again."""
        write_text(self.progress_folder / unit_id, f"{progress}\n")

    def _get_runs_file(self, unit_id: str) -> Path:
        """Return the path of the log of a unit's processes."""
        return self.folder / "runs" / f"{unit_id}.jsonl"


def _get_last(rows: list[dict[str, Any]], name: str) -> float | None:
    """Return the last row's value of a name; None without rows or value."""
    last: Mapping[str, Any] = rows[-1] if rows else {}
    return last.get(name)
