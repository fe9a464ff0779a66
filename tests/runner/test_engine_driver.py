"""The driver of an engine: what it submits, how it attaches, and what it makes of jobs that end early."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gkd_lab.config import Grid
from gkd_lab.config.units import Unit
from gkd_lab.runner.engines.driver import Driver, EngineUnreachable, JobState
from gkd_lab.store import Store
from gkd_lab.store.attempts import is_marked_as_killed, read_attempt
from gkd_lab.store.unit_files import UnitFiles, UnitJob
from gkd_lab.store.unit_state import get_unit_records
from gkd_lab.tables.failure_causes import format_failures, list_failures

from .tiny_experiments import tiny_grid

DONE, FAILED = JobState("COMPLETED", is_alive=False), JobState("FAILED", is_alive=False)
CANCELLED = JobState("CANCELLED", is_alive=False, is_cancelled=True)
OUT_OF_MEMORY = JobState("OUT_OF_MEMORY", is_alive=False, is_out_of_memory=True)
DROPPED = JobState("CANCELLED", is_alive=False)
RUNNING = JobState("RUNNING", is_alive=True, place="n1")


@dataclass
class FakeEngine:
    """Engine that runs each job at the first question after its needs, by a function of the unit."""

    work: Callable[[Unit, int], JobState]
    """Does a unit's work and returns the state in which its job ends; int: the number of its submission."""
    name: str = "Fake"
    jobs: dict[str, tuple[UnitJob, Unit, list[str]]] = field(default_factory=dict)
    states: dict[str, JobState] = field(default_factory=dict)
    submissions: dict[str, int] = field(default_factory=dict)
    is_silent: bool = False

    def submit(
        self, units: Sequence[Unit], alive: Mapping[str, UnitJob], open_needs: Mapping[str, Collection[str]]
    ) -> list[UnitJob]:
        jobs = []
        for unit in units:
            self.submissions[unit.id] = self.submissions.get(unit.id, 0) + 1
            job = UnitJob(unit.id, "fake", f"{unit.id}-{self.submissions[unit.id]}", "x.log")
            self.jobs[job.job] = job, unit, list(open_needs[unit.id])
            self.states[job.job] = JobState("PENDING", is_alive=True, is_waiting=True)
            jobs.append(job)
        return jobs

    def find_jobs(self) -> dict[str, UnitJob]:
        return {job.unit: job for job, _, _ in self.jobs.values() if self.states[job.job].is_alive}

    def read_states(self, jobs: Collection[UnitJob]) -> dict[str, JobState]:
        if self.is_silent:
            self.is_silent = False
            raise EngineUnreachable("no answer")
        for name, (_, unit, needs) in self.jobs.items():
            if self.states[name].is_waiting:
                ends = [self.states[f"{need}-{self.submissions[need]}"] for need in needs]
                if all(end == DONE for end in ends):
                    self.states[name] = self.work(unit, self.submissions[unit.id])
                elif not any(end.is_alive for end in ends):
                    self.states[name] = DROPPED
        return {job.job: self.states[job.job] for job in jobs if job.job in self.states}

    def describe_cancelling(self, jobs: Collection[UnitJob]) -> str:
        return f"cancel {len(jobs)}"


def finish_unit(grid: Grid, store: Store, unit: Unit) -> JobState:
    """Mark every record of a unit as done, with its evaluations."""
    for record, *cells in zip(get_unit_records(unit, store), unit.cells, strict=False):
        for cell in cells if unit.kind == "pack" else unit.cells:
            for evaluation in cell.evaluations:
                scores = {metric: {"value": 1.0} for metric in evaluation.metrics}
                record.get_evaluation(evaluation).write_results(evaluation, [], scores)
        record.mark_done()
    return DONE


def drive(
    tmp_path: Path, work: Callable[[Grid, Store, Unit, int], JobState]
) -> tuple[Driver, FakeEngine, list[str]]:
    grid, store = tiny_grid(tmp_path, "arithmetic"), Store(tmp_path / "outputs")
    engine = FakeEngine(lambda unit, number: work(grid, store, unit, number))
    lines: list[str] = []
    return Driver(grid, 3, store, engine, lines.append, poll_seconds=0.01), engine, lines


def test_all_units_are_submitted_in_order_and_done_ones_never_again(tmp_path: Path) -> None:
    driver, engine, lines = drive(tmp_path, lambda grid, store, unit, _: finish_unit(grid, store, unit))
    driver.start()
    outcome = driver.follow()
    assert (outcome.failures, outcome.unfinished) == ([], [])
    assert list(engine.submissions.values()) == [1, 1, 1, 1]
    assert [needs for _, _, needs in engine.jobs.values()][:2] == [[], []]
    assert all(len(needs) == 2 for _, unit, needs in engine.jobs.values() if unit.kind == "pack")
    assert lines[0] == "tiny: 4 units submitted to Fake"
    assert lines[-1] == "tiny: of 4 units 4 done"
    again = Driver(driver.grid, 3, driver.store, engine, lines.append)
    again.start()
    assert again.alive == {} and list(engine.submissions.values()) == [1, 1, 1, 1]


def test_a_second_driver_attaches_to_jobs_that_no_driver_has_logged(tmp_path: Path) -> None:
    driver, engine, lines = drive(tmp_path, lambda grid, store, unit, _: finish_unit(grid, store, unit))
    driver.start()
    driver.files.jobs_file.unlink()  # as if the first had been killed right after it submitted
    second = Driver(driver.grid, 3, driver.store, engine, lines.append, poll_seconds=0.01)
    second.start()
    assert len(second.alive) == 4 and list(engine.submissions.values()) == [1, 1, 1, 1]
    assert lines[-1] == "tiny: 0 units submitted to Fake, attached to 4 that run or wait"
    assert second.describe_leaving("gkd-lab run tiny") == (
        "4 jobs go on; attach: `gkd-lab run tiny`; cancel: `cancel 4`"
    )
    engine.is_silent = True
    assert second.follow().unfinished == []
    assert any("does not answer, trying again" in line for line in lines)


def test_killed_unit_and_what_was_dropped_for_it_are_submitted_again(tmp_path: Path) -> None:
    def work(grid: Grid, store: Store, unit: Unit, number: int) -> JobState:
        if unit.kind == "teacher" and number < 3:
            UnitFiles.locate(store.root, grid.fingerprint).log_run(unit.id, event="start", host="n1")
            return FAILED
        return finish_unit(grid, store, unit)

    driver, engine, _ = drive(tmp_path, work)
    driver.start()
    assert driver.follow().unfinished == []
    assert list(engine.submissions.values()) == [3, 1, 3, 3]


def test_unit_that_the_engine_killed_for_lack_of_memory_takes_fewer_cells(tmp_path: Path) -> None:
    attempts = []

    def work(grid: Grid, store: Store, unit: Unit, number: int) -> JobState:
        records = get_unit_records(unit, store)
        if unit.kind == "pack" and number == 1:
            for record in records:
                record.folder.mkdir(parents=True)
                (record.folder / "attempt.json").write_text('{"cells": 3}')
            UnitFiles.locate(store.root, grid.fingerprint).log_run(unit.id, event="start", host="n1")
            return OUT_OF_MEMORY
        if unit.kind == "pack":
            attempts.extend(map(read_attempt, records))
        return finish_unit(grid, store, unit)

    driver, engine, _ = drive(tmp_path, work)
    driver.start()
    assert driver.follow().unfinished == []
    assert list(engine.submissions.values()) == [1, 1, 2, 2]
    assert attempts and all(attempt is not None and is_marked_as_killed(attempt) for attempt in attempts)


def test_unit_that_is_killed_every_time_is_given_up(tmp_path: Path) -> None:
    def work(grid: Grid, store: Store, unit: Unit, _: int) -> JobState:
        if unit.kind == "teacher":
            UnitFiles.locate(store.root, grid.fingerprint).log_run(unit.id, event="start", host="n1")
            return FAILED
        return finish_unit(grid, store, unit)

    driver, engine, _ = drive(tmp_path, work)
    driver.start()
    unfinished = driver.follow().unfinished
    assert engine.submissions[next(iter(driver.units))] == 4
    assert len(unfinished) == 3
    assert "was killed, and started again 3 times" in unfinished[0] and "log x.log" in unfinished[0]
    assert all("was not started" in line for line in unfinished[1:])


def test_cancelled_unit_stays_cancelled_until_the_next_run(tmp_path: Path) -> None:
    has_cancelled = []

    def work(grid: Grid, store: Store, unit: Unit, _: int) -> JobState:
        if unit.kind == "start" and not has_cancelled:
            has_cancelled.append(unit.id)
            UnitFiles.locate(store.root, grid.fingerprint).log_run(unit.id, event="start", host="n1")
            return CANCELLED
        return finish_unit(grid, store, unit)

    driver, engine, lines = drive(tmp_path, work)
    driver.start()
    unfinished = driver.follow().unfinished
    assert list(engine.submissions.values()) == [1, 1, 1, 1]
    assert len(unfinished) == 3 and "was cancelled; run again to go on" in unfinished[0]
    again = Driver(driver.grid, 3, driver.store, engine, lines.append, poll_seconds=0.01)
    again.start()
    assert again.follow().unfinished == []
    assert list(engine.submissions.values()) == [1, 2, 2, 2]


def test_failed_teacher_leaves_its_packs_with_the_line_of_a_local_run(tmp_path: Path) -> None:
    def work(grid: Grid, store: Store, unit: Unit, _: int) -> JobState:
        if unit.kind == "teacher":
            get_unit_records(unit, store)[0].mark_failed("RuntimeError: broken")
            return FAILED
        return finish_unit(grid, store, unit)

    driver, engine, _ = drive(tmp_path, work)
    driver.start()
    outcome = driver.follow()
    assert outcome.unfinished == []
    assert outcome.failures == format_failures(list_failures(driver.grid, driver.store))
    (line,) = outcome.failures
    assert "RuntimeError: broken; 6 cells were not run" in line
    assert list(engine.submissions.values()) == [1, 1, 1, 1]
