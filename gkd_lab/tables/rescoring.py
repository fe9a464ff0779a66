"""Recompute the metrics of an experiment from stored predictions: no training, no model, no torch."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

from filelock import Timeout

from gkd_lab.config import Cell, Grid
from gkd_lab.config.cell import LmEvalEvaluation, list_references
from gkd_lab.metrics import Scorer
from gkd_lab.store import DamagedRecord, EvaluationRecord, Record, Store
from gkd_lab.store.rescore import MetricScores, rescore_evaluation
from gkd_lab.tables.results import name_evaluations

_MIN_RECORDS_FOR_PROCESSES = 100
"""With fewer records one process is as fast: each further one imports for a second or two."""
_RECORDS_PER_CHUNK = 8


@dataclass(frozen=True)
class EvaluationJob:
    """One evaluation of a record, and the metrics to compute for it."""

    record: EvaluationRecord
    name: str
    """Its task and its name in the table."""
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class RescoreJob:
    """A cell or reference model with its finished evaluations."""

    record: Record
    evaluations: tuple[EvaluationJob, ...]


@dataclass(frozen=True)
class ScoreChange:
    """A score before and after; None where there was none before."""

    name: str
    old_value: float | None
    new_value: float
    old_signature: str | None
    new_signature: str

    @property
    def is_changed(self) -> bool:
        """Whether the value or its signature differs from before; True for a new score."""
        return self.old_value != self.new_value or self.old_signature != self.new_signature


@dataclass
class RescoreOutcome:
    """Results of rescoring some records."""

    evaluation_count: int = 0
    prediction_count: int = 0
    changes: list[ScoreChange] = field(default_factory=list)
    damage_messages: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    """(reason, evaluation's folder) for each metric that does not apply to the predictions."""
    locked_folders: list[str] = field(default_factory=list)
    """Records that another process works on; they were skipped."""

    @property
    def is_complete(self) -> bool:
        """Whether no record was damaged or locked and no metric refused its predictions."""
        return not (self.damage_messages or self.refusals or self.locked_folders)

    def add(self, other: "RescoreOutcome") -> None:
        """Add the counts and append the lists of another outcome to this one, in place."""
        self.evaluation_count += other.evaluation_count
        self.prediction_count += other.prediction_count
        self.changes += other.changes
        self.damage_messages += other.damage_messages
        self.refusals += other.refusals
        self.locked_folders += other.locked_folders


def collect_rescore_jobs(
    grid: Grid, store: Store, metrics: Sequence[str] | None
) -> tuple[list[RescoreJob], list[str]]:
    """Return (a job per record, reference models first; folders of evaluations not finished).

    `metrics` None: those that the grid's evaluations name. lm-eval's evaluations are left out.
    """
    jobs, missing = [], []
    for record, cells in _iterate_records(grid, store):
        evaluations = list(_collect_evaluations(record, cells, metrics))
        finished = tuple(job for job in evaluations if job.record.read_state() == "done")
        missing += [str(job.record.folder) for job in evaluations if job not in finished]
        if finished:
            jobs.append(RescoreJob(record, finished))
    return jobs, missing


def _iterate_records(grid: Grid, store: Store) -> Iterator[tuple[Record, list[Cell]]]:
    """Yield (record, cells that use it): each reference model, then each cell with itself."""
    for role, model, cells in list_references(grid.cells):
        yield store.get_artifact(grid.scale, role, model), cells
    for cell in grid.cells:
        yield store.get_record(cell), [cell]


def _collect_evaluations(
    record: Record, cells: Sequence[Cell], metrics: Sequence[str] | None
) -> Iterator[EvaluationJob]:
    """Yield a job per distinct evaluation: with `metrics`, else with all that some cell names.

    lm-eval's evaluations are left out.
    """
    collected: dict[Path, tuple[EvaluationRecord, str, dict[str, None]]] = {}
    for evaluations in dict.fromkeys(cell.evaluations for cell in cells):
        names = name_evaluations(evaluations)
        for evaluation in evaluations:
            if isinstance(evaluation, LmEvalEvaluation):
                continue
            part = record.get_evaluation(evaluation)
            name = f"{cells[0].task} {names[evaluation.folder]}"
            wanted = collected.setdefault(part.folder, (part, name, {}))[2]
            wanted.update(dict.fromkeys(metrics or evaluation.metrics))
    for part, name, wanted in collected.values():
        yield EvaluationJob(part, name, tuple(wanted))


def list_lm_eval_evaluations(grid: Grid) -> list[str]:
    """List the distinct names of the grid's lm-eval evaluations, which cannot be rescored."""
    evaluations = (evaluation for cell in grid.cells for evaluation in cell.evaluations)
    return list(dict.fromkeys(e.name for e in evaluations if isinstance(e, LmEvalEvaluation)))


# ---- work ----


def rescore_records(
    jobs: Sequence[RescoreJob], report_progress: Callable[[int], None] = lambda done: None
) -> RescoreOutcome:
    """Rewrite the scores of all records, each under its lock; return the summed outcome.

    `report_progress` is called with the number of finished jobs so far. Damaged and locked records are
    listed in the outcome, and the others are rescored. Raises OSError when a file cannot be written.
    """
    outcome, done = RescoreOutcome(), 0
    for part, count in _rescore_in_processes(jobs):
        outcome.add(part)
        done += count
        report_progress(done)
    return outcome


def _rescore_in_processes(jobs: Sequence[RescoreJob]) -> Iterator[tuple[RescoreOutcome, int]]:
    """Yield (outcome, number of its jobs): job by job if few, else in chunks by processes."""
    workers = os.cpu_count() or 1
    if len(jobs) < _MIN_RECORDS_FOR_PROCESSES or workers == 1:
        yield from ((rescore_sequentially([job]), 1) for job in jobs)
        return
    chunks = [jobs[start : start + _RECORDS_PER_CHUNK] for start in range(0, len(jobs), _RECORDS_PER_CHUNK)]
    # A spawned process, not a forked one: the caller may hold threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), _ignore_interrupts) as pool:
        yield from zip(pool.map(rescore_sequentially, chunks), map(len, chunks), strict=True)


def _ignore_interrupts() -> None:
    """Make this worker process ignore Ctrl-C; the parent process handles it.

    Ctrl-C reaches all processes of a terminal: the caller stops after open records.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@cache
def _get_scorer() -> Scorer:
    """Return the one scorer of this process, cached: records share references and predictions."""
    return Scorer()


def rescore_sequentially(jobs: Iterable[RescoreJob]) -> RescoreOutcome:
    """Rescore records one by one in this process, skipping locked ones; return one outcome."""
    outcome, scorer = RescoreOutcome(), _get_scorer()
    for job in jobs:
        try:
            # Not 0: a reader that asks whether a record is locked holds the lock for an instant.
            with job.record.lock().acquire(timeout=0.2, poll_interval=0.02):
                for evaluation in job.evaluations:
                    _rescore_evaluation(evaluation, outcome, scorer)
        except Timeout:
            outcome.locked_folders.append(str(job.record.folder))
    return outcome


def _rescore_evaluation(evaluation: EvaluationJob, outcome: RescoreOutcome, scorer: Scorer) -> None:
    """Rewrite the scores of one evaluation; add counts and changes, or the failure, to `outcome`."""
    try:
        rescored = rescore_evaluation(evaluation.record, evaluation.metrics, scorer)
    except DamagedRecord as error:
        outcome.damage_messages.append(str(error))
        return
    except ValueError as error:  # self_bleu of one text a prompt
        outcome.refusals.append((str(error), str(evaluation.record.folder)))
        return
    outcome.evaluation_count += 1
    outcome.prediction_count += rescored.prediction_count
    outcome.changes += [
        _build_score_change(evaluation.name, metric, rescored.scores_before, rescored.scores_after)
        for metric in evaluation.metrics
    ]


def _build_score_change(name: str, metric: str, before: MetricScores, after: MetricScores) -> ScoreChange:
    """Pair the old and new value and signature of one metric, named `<name>/<metric>`."""
    old, new = before.get(metric, {}), after[metric]
    return ScoreChange(
        f"{name}/{metric}", old.get("value"), new["value"], old.get("signature"), new["signature"]
    )


# ---- text ----

_MAX_LISTED = 5


def format_rescored_lines(outcome: RescoreOutcome, record_count: int) -> Iterator[str]:
    """Yield a line with the counts, then a line per evaluation and metric on what changed."""
    yield (
        f"rescored {_format_count(outcome.evaluation_count, 'evaluation')} of "
        f"{_format_count(record_count, 'record')}, {outcome.prediction_count:,} predictions"
    )
    for name in dict.fromkeys(change.name for change in outcome.changes):
        yield f"{name}: {_format_changes([change for change in outcome.changes if change.name == name])}"


def _format_changes(changes: Sequence[ScoreChange]) -> str:
    """Format the changes of one metric: `unchanged in 5`, `new in 5, mean ...` or `changed in 3 of 5`."""
    changed = [change for change in changes if change.is_changed]
    if not changed:
        return f"unchanged in {len(changes)}"
    added = [change for change in changed if change.old_value is None]
    if len(added) == len(changes):
        return f"new in {len(added)}, mean {_format_new_mean(added)}; {_join_signatures(added)}"
    replaced = [change for change in changed if change.old_value is not None]
    parts = []
    if replaced:
        parts.append(f"changed in {len(replaced)} of {len(changes)}, mean {_format_mean_change(replaced)}")
    parts += [f"new in {len(added)}"] if added else []
    old_signatures = {str(change.old_signature) for change in replaced}
    outdated = sorted(old_signatures - {change.new_signature for change in replaced})
    parts.append(_join_signatures(changed))
    return "; ".join([*parts, *([f"was {', '.join(outdated)}"] if outdated else [])])


def _format_mean_change(changes: Sequence[ScoreChange]) -> str:
    """Format means and smallest to largest change: `30.10 -> 31.20 (+0.50 to +2.00)`."""
    old = [change.old_value for change in changes if change.old_value is not None]
    steps = [change.new_value - value for change, value in zip(changes, old, strict=True)]
    return f"{fmean(old):.2f} -> {_format_new_mean(changes)} ({min(steps):+.2f} to {max(steps):+.2f})"


def _format_new_mean(changes: Sequence[ScoreChange]) -> str:
    """Format the mean of the new values with two decimals."""
    return f"{fmean(change.new_value for change in changes):.2f}"


def _join_signatures(changes: Sequence[ScoreChange]) -> str:
    """Join the distinct new signatures with commas, sorted."""
    return ", ".join(sorted({change.new_signature for change in changes}))


def format_unscored_lines(grid: Grid, outcome: RescoreOutcome, missing: Sequence[str]) -> Iterator[str]:
    """Yield a line per failure reason, and one each on locked, unfinished and lm-eval parts."""
    for message in outcome.damage_messages:
        yield f"failed: {message}"
    for reason in dict.fromkeys(reason for reason, _ in outcome.refusals):
        folders = [folder for other, folder in outcome.refusals if other == reason]
        yield _join_truncated(f"failed: {reason}", folders)
    if outcome.locked_folders:
        yield _join_truncated("left alone, another process works there", outcome.locked_folders)
    if missing:
        count = _format_count(len(missing), "evaluation")
        yield _join_truncated(f"{count} not finished, so without predictions", missing)
    lm_eval_names = list_lm_eval_evaluations(grid)
    if lm_eval_names:
        yield _join_truncated("scored by lm-eval, whose scores are kept as they are", lm_eval_names)


def _join_truncated(heading: str, names: Sequence[str]) -> str:
    """Format `heading: a, b, c, d, e and 3 more`: five names at most."""
    hidden = len(names) - _MAX_LISTED
    return f"{heading}: {', '.join(names[:_MAX_LISTED])}" + (f" and {hidden} more" if hidden > 0 else "")


def _format_count(number: int, noun: str) -> str:
    """Format `1 record` or `2,000 records`: thousands separator, plural by an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
