"""What `rescore` did, in a few lines however many cells there were."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from gkd_lab.config import GridOfCells
from gkd_lab.tables.rescoring import Change, Outcome, by_lm_eval

_MOST_NAMED = 5


def rescored_lines(outcome: Outcome, records: int) -> Iterator[str]:
    """A line for what was read, and one for each metric of each evaluation."""
    yield (
        f"rescored {_count(outcome.evaluations, 'evaluation')} of {_count(records, 'record')}, "
        f"{outcome.predictions:,} predictions"
    )
    for name in dict.fromkeys(change.name for change in outcome.changes):
        yield f"{name}: {_told([change for change in outcome.changes if change.name == name])}"


def _told(changes: Sequence[Change]) -> str:
    moved = [change for change in changes if change.moved]
    if not moved:
        return f"unchanged in {len(changes)}"
    new = [change for change in moved if change.was is None]
    if len(new) == len(changes):
        return f"new in {len(new)}, mean {_mean(new)}; {_signatures(new)}"
    known = [change for change in moved if change.was is not None]
    parts = [f"changed in {len(known)} of {len(changes)}, mean {_means(known)}"] if known else []
    parts += [f"new in {len(new)}"] if new else []
    was = sorted({str(change.was_signature) for change in known} - {c.signature for c in known})
    return "; ".join([*parts, _signatures(moved), *([f"was {', '.join(was)}"] if was else [])])


def _means(changes: Sequence[Change]) -> str:
    by = [change.now - change.was for change in changes if change.was is not None]
    before = fmean(change.was for change in changes if change.was is not None)
    return f"{before:.2f} -> {_mean(changes)} ({min(by):+.2f} to {max(by):+.2f})"


def _mean(changes: Sequence[Change]) -> str:
    return f"{fmean(change.now for change in changes):.2f}"


def _signatures(changes: Sequence[Change]) -> str:
    return ", ".join(sorted({change.signature for change in changes}))


def unscored_lines(grid: GridOfCells, outcome: Outcome, missing: Sequence[str]) -> Iterator[str]:
    """What was not rescored, and why."""
    for line in outcome.damaged:
        yield f"failed: {line}"
    for why in dict.fromkeys(why for why, _ in outcome.refused):
        yield _named(f"failed: {why}", [place for reason, place in outcome.refused if reason == why])
    if outcome.busy:
        yield _named("left alone, another process works there", outcome.busy)
    if missing:
        yield _named(f"{_count(len(missing), 'evaluation')} not finished, so without predictions", missing)
    harness = by_lm_eval(grid)
    if harness:
        yield _named("scored by lm-eval, whose scores are kept as they are", harness)


def _named(what: str, places: Sequence[str]) -> str:
    """`what: a, b and 3 more`."""
    more = len(places) - _MOST_NAMED
    return f"{what}: {', '.join(places[:_MOST_NAMED])}" + (f" and {more} more" if more > 0 else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
