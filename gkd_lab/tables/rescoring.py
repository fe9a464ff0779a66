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

from gkd_lab.config import Cell, GridOfCells
from gkd_lab.config.cell import HarnessEvaluation, references
from gkd_lab.metrics import Scorer
from gkd_lab.store import DamagedRecord, EvaluationRecord, Record, Store
from gkd_lab.store.rescore import Scores, rejudge
from gkd_lab.tables.rows import evaluation_names

Advance = Callable[[int], None]

_ALONE_BELOW = 100
"""Records that one process rescores as soon as others have started: each imports for a second or two."""
_AT_ONCE = 8
"""Records that a process is given at a time."""


@dataclass(frozen=True)
class Judged:
    """One evaluation of a record, and what is to be computed of it."""

    part: EvaluationRecord
    name: str
    """Its task and its name in the table."""
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A cell or a reference model with its finished evaluations."""

    record: Record
    judged: tuple[Judged, ...]


@dataclass(frozen=True)
class Change:
    """A score before and after; None where there was none."""

    name: str
    was: float | None
    now: float
    was_signature: str | None
    signature: str

    @property
    def moved(self) -> bool:
        return self.was != self.now or self.was_signature != self.signature


@dataclass
class Outcome:
    """What became of some records."""

    evaluations: int = 0
    predictions: int = 0
    changes: list[Change] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(why a metric cannot judge them, the evaluation's folder)."""
    busy: list[str] = field(default_factory=list)
    """Records that another process works on: left alone."""

    @property
    def whole(self) -> bool:
        """Whether all that there is was rescored."""
        return not (self.damaged or self.refused or self.busy)

    def add(self, other: "Outcome") -> None:
        self.evaluations += other.evaluations
        self.predictions += other.predictions
        self.changes += other.changes
        self.damaged += other.damaged
        self.refused += other.refused
        self.busy += other.busy


def jobs(grid: GridOfCells, store: Store, metrics: Sequence[str] | None) -> tuple[list[Job], list[str]]:
    """(what can be rescored, folders of evaluations without predictions yet), reference models first.

    `metrics` None: those that the evaluations of the grid ask for. lm-eval's are not among them.
    """
    found, missing = [], []
    for record, cells in _records(grid, store):
        judged = list(_judged(record, cells, metrics))
        there = tuple(one for one in judged if one.part.state() == "done")
        missing += [str(one.part.folder) for one in judged if one.part.state() != "done"]
        if there:
            found.append(Job(record, there))
    return found, missing


def by_lm_eval(grid: GridOfCells) -> list[str]:
    """Names of the evaluations whose scores are lm-eval's own: no predictions of ours to score again."""
    every = (one for cell in grid.cells for one in cell.evaluations)
    return list(dict.fromkeys(one.name for one in every if isinstance(one, HarnessEvaluation)))


def rescore(work: Sequence[Job], advance: Advance = lambda done: None) -> Outcome:
    """Rescore each record under its lock; `advance` is told how many are through.

    Damage and locks are in the outcome, and the other records are done. Raises OSError when nothing
    can be written.
    """
    outcome, done = Outcome(), 0
    for part, count in _outcomes(work):
        outcome.add(part)
        done += count
        advance(done)
    return outcome


def _outcomes(work: Sequence[Job]) -> Iterator[tuple[Outcome, int]]:
    workers = os.cpu_count() or 1
    if len(work) < _ALONE_BELOW or workers == 1:
        yield from ((rescore_some([job]), 1) for job in work)
        return
    groups = [work[at : at + _AT_ONCE] for at in range(0, len(work), _AT_ONCE)]
    # A started process, not a forked one: the caller may hold threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), _leave_interrupts_to_the_caller) as pool:
        yield from zip(pool.map(rescore_some, groups), map(len, groups), strict=True)


def _leave_interrupts_to_the_caller() -> None:
    """Ctrl-C reaches all processes of a terminal: a record under way is finished, no other is begun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@cache
def _scorer() -> Scorer:
    """One for all records of a process: they share references, and often predictions."""
    return Scorer()


def rescore_some(work: Iterable[Job]) -> Outcome:
    """One record after another, in this process."""
    outcome, scorer = Outcome(), _scorer()
    for job in work:
        try:
            # Not 0: a reader that asks whether a record is claimed holds the lock for an instant.
            with job.record.lock().acquire(timeout=0.2, poll_interval=0.02):
                for judged in job.judged:
                    _rescore(judged, outcome, scorer)
        except Timeout:
            outcome.busy.append(str(job.record.folder))
    return outcome


def _rescore(judged: Judged, outcome: Outcome, scorer: Scorer) -> None:
    try:
        found = rejudge(judged.part, judged.metrics, scorer)
    except DamagedRecord as error:
        outcome.damaged.append(str(error))
        return
    except ValueError as error:  # self_bleu of one text a prompt
        outcome.refused.append((str(error), str(judged.part.folder)))
        return
    outcome.evaluations += 1
    outcome.predictions += found.predictions
    outcome.changes += [_change(judged.name, one, found.before, found.after) for one in judged.metrics]


def _change(name: str, metric: str, before: Scores, after: Scores) -> Change:
    was, now = before.get(metric, {}), after[metric]
    return Change(f"{name}/{metric}", was.get("value"), now["value"], was.get("signature"), now["signature"])


def _records(grid: GridOfCells, store: Store) -> Iterator[tuple[Record, list[Cell]]]:
    for role, model, cells in references(grid.cells):
        yield store.artifact(grid.scale, role, model), cells
    for cell in grid.cells:
        yield store.of(cell), [cell]


def _judged(record: Record, cells: Sequence[Cell], metrics: Sequence[str] | None) -> Iterator[Judged]:
    """Each evaluation once, with all that some cell asks of it."""
    asked: dict[Path, tuple[EvaluationRecord, str, dict[str, None]]] = {}
    for evaluations in dict.fromkeys(cell.evaluations for cell in cells):
        names = evaluation_names(evaluations)
        for evaluation in evaluations:
            if isinstance(evaluation, HarnessEvaluation):
                continue
            part = record.evaluation(evaluation)
            name = f"{cells[0].task} {names[evaluation.folder]}"
            wanted = asked.setdefault(part.folder, (part, name, {}))[2]
            wanted.update(dict.fromkeys(metrics or evaluation.metrics))
    for part, name, wanted in asked.values():
        yield Judged(part, name, tuple(wanted))
