"""Submit the units of a grid that are neither done nor alive to an engine, follow them, end by the records.

The driver holds no state that counts: killed and started again, it finds the jobs in the outputs folder and
attaches to those that the engine still has.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gkd_lab.config import Grid
from gkd_lab.config.fingerprint import compute_fingerprint
from gkd_lab.config.packs import PackLimit
from gkd_lab.config.units import Unit, plan_units
from gkd_lab.store import State, Store
from gkd_lab.store.attempts import mark_killed_for_memory
from gkd_lab.store.lock import FolderLock
from gkd_lab.store.unit_files import UnitFiles, UnitJob
from gkd_lab.store.unit_state import get_unit_records, is_unit_settled, read_output_state, read_unit_state
from gkd_lab.tables.failure_causes import format_failures, list_failures

MAX_RESUBMISSIONS = 3
"""Times that one driver submits a unit anew whose job was killed and not requeued."""
MAX_SILENT_SECONDS = 600
"""Seconds that an engine may not answer, as while its controller starts again, before the driver gives up."""


@dataclass(frozen=True)
class JobState:
    """What an engine says of a job."""

    text: str
    """In the engine's own words: PENDING, RUNNING, CANCELLED."""
    is_alive: bool
    is_waiting: bool = False
    """Whether it has not started, or waits to start again."""
    is_cancelled: bool = False
    """Whether someone cancelled it; False where it was dropped because a job that it needs has failed."""
    is_out_of_memory: bool = False
    """Whether the engine ended it for lack of memory."""
    place: str = ""
    """Machine that it runs on, or why it waits."""


def name_grid_in_place(grid: Grid, files: UnitFiles) -> str:
    """Return a name for a grid's jobs in this outputs folder: a grid may be run in several at once."""
    return f"{grid.name}-{grid.fingerprint}-{compute_fingerprint(str(files.folder.absolute()))[:6]}"


class EngineUnreachable(RuntimeError):
    """The engine does not answer now; its jobs may go on."""


class Engine(Protocol):
    """A system that runs units: it places, restarts and limits them."""

    @property
    def name(self) -> str:
        """Name for people."""

    def submit(
        self, units: Sequence[Unit], alive: Mapping[str, UnitJob], open_needs: Mapping[str, Collection[str]]
    ) -> list[UnitJob]:
        """Submit units in their order and return their jobs.

        alive: unit id -> job that runs or waits. open_needs: unit id -> ids of the units whose output it must
        wait for, each in `alive` or among `units`.
        """

    def find_jobs(self) -> dict[str, UnitJob]:
        """Return unit id -> alive job of this grid that the engine knows, logged by a driver or not."""

    def read_states(self, jobs: Collection[UnitJob]) -> dict[str, JobState]:
        """Return job -> state. One that the engine has forgotten is missing. EngineUnreachable: no answer."""

    def describe_cancelling(self, jobs: Collection[UnitJob]) -> str:
        """Return the command line that cancels jobs."""

    def cancel(self, jobs: Collection[UnitJob]) -> None:
        """Cancel jobs; those that run save first."""


@dataclass
class EngineOutcome:
    """What a run on an engine left: lines on failures, and on units that were not finished."""

    failures: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    """A line per unit that is neither done nor failed: cancelled, killed too often, or refused."""


class Driver:
    """Driver of one grid on one engine."""

    def __init__(
        self,
        grid: Grid,
        limit: PackLimit,
        store: Store,
        engine: Engine,
        say: Callable[[str], None],
        poll_seconds: float = 5.0,
    ) -> None:
        self.grid, self.store, self.engine, self.say = grid, store, engine, say
        self.limit, self.poll_seconds = limit, poll_seconds
        self.files = UnitFiles.locate(store.root.absolute(), grid.fingerprint)
        self.units = {unit.id: unit for unit in plan_units(grid.cells, limit)}
        self.alive: dict[str, UnitJob] = {}
        self._last_states: dict[str, JobState] = {}
        self._resubmissions: Counter[str] = Counter()
        self._last_counts = ""
        self._done_ids: set[str] = set()
        self._suspects: dict[str, float] = {}
        """Job -> when it was first seen to have ended without results: it may be about to be requeued."""

    def start(self) -> None:
        """Attach to the jobs that are alive, and submit all other units that have something left to do."""
        self.files.create_folders()
        self.files.write_pack_limit(self.limit)
        with FolderLock(self.files.folder).acquire():
            self.alive = self._find_alive_jobs()
            attached = len(self.alive)
            submitted = self._submit([unit for unit in self.units.values() if unit.id not in self.alive])
        attached_text = f", attached to {attached} that run or wait" if attached else ""
        self.say(f"{self.grid.name}: {submitted} units submitted to {self.engine.name}{attached_text}")

    def follow(self) -> EngineOutcome:
        """Wait for all jobs, and submit killed ones anew; return the outcome that the records hold."""
        silent_since: float | None = None
        while self.alive:
            try:
                self._update_jobs()
                silent_since = None
            except EngineUnreachable as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > MAX_SILENT_SECONDS:
                    raise
                self.say(f"{self.engine.name} does not answer, trying again: {error}")
            if not self.alive and not self._resubmit_killed_units():
                break
            time.sleep(self.poll_seconds)
        return self.build_outcome()

    def cancel(self) -> int:
        """Cancel the jobs that are alive; return their number."""
        with FolderLock(self.files.folder).acquire():
            self.alive = self._find_alive_jobs()
            if self.alive:
                self.engine.cancel(self.alive.values())
        return len(self.alive)

    def describe_leaving(self, command: str) -> str:
        """Return how to attach to the jobs, and how to cancel them, once the driver has left."""
        if not self.alive:
            return f"no job is left; `{command}` goes on"
        cancel = self.engine.describe_cancelling(self.alive.values())
        return f"{len(self.alive)} jobs go on; attach: `{command}`; cancel: `{cancel}`"

    def _find_alive_jobs(self) -> dict[str, UnitJob]:
        """Return unit id -> job that the engine still has; jobs that ended meanwhile are logged as ended."""
        known = self.engine.find_jobs()
        logged = self.files.read_jobs()
        found = {unit_id: job for unit_id, job in known.items() if unit_id in self.units}
        new = [job for job in found.values() if logged.get(job.unit) != job]
        self.files.log_jobs(new)
        open_jobs = [job for job in logged.values() if job.ended is None and job.unit not in found]
        states = self.engine.read_states(open_jobs)
        for job in open_jobs:
            self.files.log_end(job, states[job.job].text if job.job in states else "GONE")
        return found

    def plan_submission(self, units: Sequence[Unit]) -> tuple[list[Unit], dict[str, list[str]]]:
        """Return the units that have something left to do and no failed need, and what each must wait for.

        What a unit must wait for are ids of units whose output does not exist yet, by its id.
        """
        open_units = [unit for unit in units if not is_unit_settled(unit, self.store)]
        needed = {need for unit in open_units for need in (*unit.needs, *unit.partial_needs)}
        outputs = {need: read_output_state(self.units[need], self.store) for need in needed}
        runnable = [unit for unit in open_units if not any(outputs[need] == "failed" for need in unit.needs)]
        startable = {unit.id for unit in runnable} | self.alive.keys()
        open_needs = {
            unit.id: [
                need
                for need in (*unit.needs, *unit.partial_needs)
                if outputs[need] not in ("done", "failed") and need in startable
            ]
            for unit in runnable
        }
        return runnable, open_needs

    def _submit(self, units: Sequence[Unit]) -> int:
        """Submit those of the units that can be run and are not finished; return their number."""
        runnable, open_needs = self.plan_submission(units)
        if runnable:
            jobs = self.engine.submit(runnable, self.alive, open_needs)
            self.files.log_jobs(jobs)
            self.alive |= {job.unit: job for job in jobs}
        return len(runnable)

    def _update_jobs(self) -> None:
        """Read the states of the alive jobs; take the ended ones out of them, and say what has changed."""
        states = self.engine.read_states(self.alive.values())
        for unit_id, job in list(self.alive.items()):
            state = states.get(job.job) or JobState("GONE", is_alive=False)
            if state.is_alive or not self._is_ended(job, state):
                self._last_states[unit_id] = state
                continue
            del self.alive[unit_id]
            self._last_states[unit_id] = state
            self.files.log_end(job, state.text)
            if state.is_out_of_memory:  # the next process takes fewer cells
                for record in get_unit_records(self.units[unit_id], self.store):
                    mark_killed_for_memory(record)
        self._say_counts()

    def _is_ended(self, job: UnitJob, state: JobState) -> bool:
        """Return whether a job is over: for a moment one that is requeued looks as if it had completed."""
        if state.is_cancelled or is_unit_settled(self.units[job.unit], self.store):
            self._suspects.pop(job.job, None)
            return True
        first_seen = self._suspects.setdefault(job.job, time.monotonic())
        return time.monotonic() - first_seen >= self.poll_seconds

    def _resubmit_killed_units(self) -> bool:
        """Submit killed units anew, with those that were dropped for them; return whether there are any."""
        again: set[str] = set()
        for unit in self.units.values():
            if is_unit_settled(unit, self.store) or unit.id not in self._last_states:
                continue
            was_dropped = again.intersection((*unit.needs, *unit.partial_needs))
            if was_dropped or (self._was_killed(unit) and self._may_be_submitted_again(unit)):
                again.add(unit.id)
                self._resubmissions[unit.id] += not was_dropped
        if not again:
            return False
        self.say(f"{self.grid.name}: {len(again)} units were killed or need one that was: submitted again")
        with FolderLock(self.files.folder).acquire():
            return self._submit([unit for unit in self.units.values() if unit.id in again]) > 0

    def _was_killed(self, unit: Unit) -> bool:
        """Return whether a unit's last process was killed, or stopped by a signal, but not cancelled."""
        if self._last_states[unit.id].is_cancelled:
            return False
        runs = self.files.read_runs(unit.id)
        return runs.starts > 0 and (runs.is_running or (runs.status is not None and runs.status > 128))

    def _may_be_submitted_again(self, unit: Unit) -> bool:
        """Return whether neither the engine nor this driver has started a killed unit again too often."""
        job = self.files.read_jobs().get(unit.id)
        requeues = 0 if job is None else self.files.count_deaths(job)
        return self._resubmissions[unit.id] + requeues < MAX_RESUBMISSIONS

    def _say_counts(self) -> None:
        """Say how many units are done, failed, running and waiting, when that has changed."""
        alive = [self._last_states[unit_id] for unit_id in self.alive]
        ended = [unit for unit in self.units.values() if unit.id not in self.alive]
        settled = Counter(map(self._read_ended_state, ended))
        counts = {
            "done": settled["done"],
            "failed": settled["failed"],
            "running": sum(not state.is_waiting for state in alive),
            "waiting": sum(state.is_waiting for state in alive),
            "left": settled["missing"] + settled["running"],
        }
        text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if text != self._last_counts:
            self._last_counts = text
            self.say(f"{self.grid.name}: of {len(self.units)} units {text}")

    def _read_ended_state(self, unit: Unit) -> State:
        """Return the state of a unit without a job; one that is done stays so, and is read once."""
        if unit.id in self._done_ids:
            return "done"
        state = read_unit_state(unit, self.store)
        if state == "done":
            self._done_ids.add(unit.id)
        return state

    def build_outcome(self) -> EngineOutcome:
        """Return the failures in the records, and a line per unit that was left unfinished."""
        jobs = self.files.read_jobs()
        failed = {unit.id for unit in self.units.values() if read_output_state(unit, self.store) == "failed"}
        unfinished = []
        for unit in self.units.values():
            if is_unit_settled(unit, self.store) or failed.intersection(unit.needs):
                continue
            job, state = jobs.get(unit.id), self._last_states.get(unit.id)
            log = "" if job is None else f" (job {job.job}, log {job.log})"
            unfinished.append(f"{unit.name} ({unit.id}): {self._explain_end(unit, state)}{log}")
        return EngineOutcome(format_failures(list_failures(self.grid, self.store)), unfinished)

    def _explain_end(self, unit: Unit, state: JobState | None) -> str:
        """Return why a unit is not finished, as far as is known."""
        runs = self.files.read_runs(unit.id)
        if state is not None and state.is_cancelled:
            return "was cancelled; run again to go on"
        if state is None or not runs.starts:
            return "was not started: a unit that it needs is not finished, or the engine could not start it"
        if runs.is_running or (runs.status or 0) > 128:
            return f"was killed, and started again {MAX_RESUBMISSIONS} times"
        return f"ended without its results, with status {runs.status}"
