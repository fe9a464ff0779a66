"""What `rescore` did, in a few lines however many cells there were."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from gkd_lab.config import Grid
from gkd_lab.tables.rescoring import RescoreOutcome, ScoreChange, list_lm_eval_evaluations

_MAX_LISTED = 5


def format_rescored_lines(outcome: RescoreOutcome, record_count: int) -> Iterator[str]:
    """A line for what was read, and one for each metric of each evaluation."""
    yield (
        f"rescored {_format_count(outcome.evaluation_count, 'evaluation')} of {_format_count(record_count, 'record')}, "
        f"{outcome.prediction_count:,} predictions"
    )
    for name in dict.fromkeys(change.name for change in outcome.changes):
        yield f"{name}: {_format_changes([change for change in outcome.changes if change.name == name])}"


def _format_changes(changes: Sequence[ScoreChange]) -> str:
    moved = [change for change in changes if change.is_changed]
    if not moved:
        return f"unchanged in {len(changes)}"
    new = [change for change in moved if change.old_value is None]
    if len(new) == len(changes):
        return f"new in {len(new)}, mean {_format_new_mean(new)}; {_join_signatures(new)}"
    known = [change for change in moved if change.old_value is not None]
    parts = [f"changed in {len(known)} of {len(changes)}, mean {_format_mean_change(known)}"] if known else []
    parts += [f"new in {len(new)}"] if new else []
    was = sorted({str(change.old_signature) for change in known} - {c.new_signature for c in known})
    return "; ".join([*parts, _join_signatures(moved), *([f"was {', '.join(was)}"] if was else [])])


def _format_mean_change(changes: Sequence[ScoreChange]) -> str:
    by = [change.new_value - change.old_value for change in changes if change.old_value is not None]
    before = fmean(change.old_value for change in changes if change.old_value is not None)
    return f"{before:.2f} -> {_format_new_mean(changes)} ({min(by):+.2f} to {max(by):+.2f})"


def _format_new_mean(changes: Sequence[ScoreChange]) -> str:
    return f"{fmean(change.new_value for change in changes):.2f}"


def _join_signatures(changes: Sequence[ScoreChange]) -> str:
    return ", ".join(sorted({change.new_signature for change in changes}))


def format_unscored_lines(grid: Grid, outcome: RescoreOutcome, missing: Sequence[str]) -> Iterator[str]:
    """What was not rescored, and why."""
    for line in outcome.damage_messages:
        yield f"failed: {line}"
    for why in dict.fromkeys(why for why, _ in outcome.refusals):
        yield _join_truncated(
            f"failed: {why}", [place for reason, place in outcome.refusals if reason == why]
        )
    if outcome.locked_folders:
        yield _join_truncated("left alone, another process works there", outcome.locked_folders)
    if missing:
        yield _join_truncated(
            f"{_format_count(len(missing), 'evaluation')} not finished, so without predictions", missing
        )
    harness = list_lm_eval_evaluations(grid)
    if harness:
        yield _join_truncated("scored by lm-eval, whose scores are kept as they are", harness)


def _join_truncated(heading: str, names: Sequence[str]) -> str:
    """`what: a, b and 3 more`."""
    more = len(names) - _MAX_LISTED
    return f"{heading}: {', '.join(names[:_MAX_LISTED])}" + (f" and {more} more" if more > 0 else "")


def _format_count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
