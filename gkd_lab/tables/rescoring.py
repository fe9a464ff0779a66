"""Metrics of a whole experiment computed anew from stored predictions: no training, no model, no torch."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from filelock import Timeout

from gkd_lab.config import Cell, Grid
from gkd_lab.config.cell import LmEvalEvaluation, list_references
from gkd_lab.metrics import Scorer
from gkd_lab.store import DamagedRecord, EvaluationRecord, Record, Store
from gkd_lab.store.rescore import MetricScores, rescore_evaluation
from gkd_lab.tables.rows import name_evaluations

ProgressCallback = Callable[[int], None]

_MIN_RECORDS_FOR_PROCESSES = 100
"""Records that one process rescores as soon as others have started: each imports for a second or two."""
_RECORDS_PER_CHUNK = 8
"""Records that a process is given at a time."""


@dataclass(frozen=True)
class EvaluationJob:
    """One evaluation of a record, and what is to be computed of it."""

    record: EvaluationRecord
    name: str
    """Its task and its name in the table."""
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class RescoreJob:
    """A cell or a reference model with its finished evaluations."""

    record: Record
    evaluations: tuple[EvaluationJob, ...]


@dataclass(frozen=True)
class ScoreChange:
    """A score before and after; None where there was none."""

    name: str
    old_value: float | None
    new_value: float
    old_signature: str | None
    new_signature: str

    @property
    def is_changed(self) -> bool:
        return self.old_value != self.new_value or self.old_signature != self.new_signature


@dataclass
class RescoreOutcome:
    """What became of some records."""

    evaluation_count: int = 0
    prediction_count: int = 0
    changes: list[ScoreChange] = field(default_factory=list)
    damage_messages: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    """(why a metric cannot judge them, the evaluation's folder)."""
    locked_folders: list[str] = field(default_factory=list)
    """Records that another process works on: left alone."""

    @property
    def is_complete(self) -> bool:
        """Whether all that there is was rescored."""
        return not (self.damage_messages or self.refusals or self.locked_folders)

    def add(self, other: "RescoreOutcome") -> None:
        self.evaluation_count += other.evaluation_count
        self.prediction_count += other.prediction_count
        self.changes += other.changes
        self.damage_messages += other.damage_messages
        self.refusals += other.refusals
        self.locked_folders += other.locked_folders


def collect_rescore_jobs(
    grid: Grid, store: Store, metrics: Sequence[str] | None
) -> tuple[list[RescoreJob], list[str]]:
    """(what can be rescored, folders of evaluations without predictions yet), reference models first.

    `metrics` None: those that the evaluations of the grid ask for. lm-eval's are not among them.
    """
    found, missing = [], []
    for record, cells in _iterate_records(grid, store):
        judged = list(_collect_evaluations(record, cells, metrics))
        there = tuple(one for one in judged if one.record.read_state() == "done")
        missing += [str(one.record.folder) for one in judged if one.record.read_state() != "done"]
        if there:
            found.append(RescoreJob(record, there))
    return found, missing


def list_lm_eval_evaluations(grid: Grid) -> list[str]:
    """Names of the evaluations whose scores are lm-eval's own: no predictions of ours to score again."""
    every = (one for cell in grid.cells for one in cell.evaluations)
    return list(dict.fromkeys(one.name for one in every if isinstance(one, LmEvalEvaluation)))


def rescore_records(
    jobs: Sequence[RescoreJob], report_progress: ProgressCallback = lambda done: None
) -> RescoreOutcome:
    """Rescore each record under its lock; `advance` is told how many are through.

    Damage and locks are in the outcome, and the other records are done. Raises OSError when nothing
    can be written.
    """
    outcome, done = RescoreOutcome(), 0
    for part, count in _rescore_in_processes(jobs):
        outcome.add(part)
        done += count
        report_progress(done)
    return outcome


def _rescore_in_processes(jobs: Sequence[RescoreJob]) -> Iterator[tuple[RescoreOutcome, int]]:
    workers = os.cpu_count() or 1
    if len(jobs) < _MIN_RECORDS_FOR_PROCESSES or workers == 1:
        yield from ((rescore_sequentially([job]), 1) for job in jobs)
        return
    groups = [jobs[at : at + _RECORDS_PER_CHUNK] for at in range(0, len(jobs), _RECORDS_PER_CHUNK)]
    # A started process, not a forked one: the caller may hold threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), _ignore_interrupts) as pool:
        yield from zip(pool.map(rescore_sequentially, groups), map(len, groups), strict=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal: a record under way is finished, no other is begun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@cache
def _get_scorer() -> Scorer:
    """One for all records of a process: they share references, and often predictions."""
    return Scorer()


def rescore_sequentially(jobs: Iterable[RescoreJob]) -> RescoreOutcome:
    """One record after another, in this process."""
    outcome, scorer = RescoreOutcome(), _get_scorer()
    for job in jobs:
        try:
            # Not 0: a reader that asks whether a record is claimed holds the lock for an instant.
            with job.record.lock().acquire(timeout=0.2, poll_interval=0.02):
                for judged in job.evaluations:
                    _rescore_evaluation(judged, outcome, scorer)
        except Timeout:
            outcome.locked_folders.append(str(job.record.folder))
    return outcome


def _rescore_evaluation(evaluation: EvaluationJob, outcome: RescoreOutcome, scorer: Scorer) -> None:
    try:
        found = rescore_evaluation(evaluation.record, evaluation.metrics, scorer)
    except DamagedRecord as error:
        outcome.damage_messages.append(str(error))
        return
    except ValueError as error:  # self_bleu of one text a prompt
        outcome.refusals.append((str(error), str(evaluation.record.folder)))
        return
    outcome.evaluation_count += 1
    outcome.prediction_count += found.prediction_count
    outcome.changes += [
        _build_score_change(evaluation.name, one, found.scores_before, found.scores_after)
        for one in evaluation.metrics
    ]


def _build_score_change(name: str, metric: str, before: MetricScores, after: MetricScores) -> ScoreChange:
    was, now = before.get(metric, {}), after[metric]
    return ScoreChange(
        f"{name}/{metric}", was.get("value"), now["value"], was.get("signature"), now["signature"]
    )


def _iterate_records(grid: Grid, store: Store) -> Iterator[tuple[Record, list[Cell]]]:
    for role, model, cells in list_references(grid.cells):
        yield store.get_artifact(grid.scale, role, model), cells
    for cell in grid.cells:
        yield store.get_record(cell), [cell]


def _collect_evaluations(
    record: Record, cells: Sequence[Cell], metrics: Sequence[str] | None
) -> Iterator[EvaluationJob]:
    """Each evaluation once, with all that some cell asks of it."""
    asked: dict[Path, tuple[EvaluationRecord, str, dict[str, None]]] = {}
    for evaluations in dict.fromkeys(cell.evaluations for cell in cells):
        names = name_evaluations(evaluations)
        for evaluation in evaluations:
            if isinstance(evaluation, LmEvalEvaluation):
                continue
            part = record.get_evaluation(evaluation)
            name = f"{cells[0].task} {names[evaluation.folder]}"
            wanted = asked.setdefault(part.folder, (part, name, {}))[2]
            wanted.update(dict.fromkeys(metrics or evaluation.metrics))
    for part, name, wanted in asked.values():
        yield EvaluationJob(part, name, tuple(wanted))
