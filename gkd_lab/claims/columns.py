"""Columns in numbers and in words: what was compared, how it came out, which ones are exceptions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gkd_lab.claims.facts import Place
from gkd_lab.claims.place_names import named, varying
from gkd_lab.statistics.bootstrap import Array

Outcome = Literal["holds", "fails", "undecided", "tie"]

_WORST: tuple[Outcome, ...] = ("fails", "undecided", "tie", "holds")


@dataclass(frozen=True)
class Judged:
    """One comparison in numbers."""

    label: str
    outcome: Outcome
    effect: float
    low: float | None
    high: float | None
    by_seed: dict[int, float]
    resampled: Array | None
    ratio: float | None


@dataclass(frozen=True)
class Column:
    """All comparisons of one column; the least of them stands for it."""

    place: Place
    comparisons: list[Judged]
    absent: list[str]
    """Models that the check asks for and the table does not."""
    undone: list[Place]
    """Those of its places that have no score yet."""

    @property
    def outcome(self) -> Outcome:
        return min((one.outcome for one in self.comparisons), key=_WORST.index)

    @property
    def least(self) -> Judged:
        return min(self.comparisons, key=lambda one: one.effect)


def told(columns: Sequence[Column], measured: bool) -> str:
    """All columns in a sentence: counts and exceptions, or numbers where there is no verdict."""
    if not measured:
        return counted(columns)
    fields = varying([column.place for column in columns])
    sign = "" if columns[0].least.ratio is not None else "+"
    parts = [f"{named(c.place, fields)} {c.least.effect:{sign}.2f}".strip() for c in columns]
    return f"{len(columns)} of {len(columns)} measured, no verdict: {', '.join(parts)}"


def counted(columns: Sequence[Column]) -> str:
    """`54 of 55`, and the exceptions by name; ratios where the claim is about one."""
    fields = varying([column.place for column in columns])
    held = sum(column.outcome == "holds" for column in columns)
    parts = [f"{held} of {len(columns)}"]
    for outcome, word in (("fails", "fails"), ("tie", "ties"), ("undecided", "undecided")):
        names = [_exception(column, fields) for column in columns if column.outcome == outcome]
        parts += [f"{word}: {' | '.join(names)}"] if names else []
    ratios = [_with_ratio(column, fields) for column in columns if column.least.ratio is not None]
    parts += [f"ratios: {', '.join(ratios)}"] if ratios else []
    return "; ".join(parts)


def _exception(column: Column, fields: Sequence[str]) -> str:
    same = [one for one in column.comparisons if one.outcome == column.outcome]
    told = ", ".join(f"{one.label} {one.effect:+.2f}" for one in same)
    if len(column.comparisons) == 1:
        told = f"{same[0].effect:+.2f}"
    name = named(column.place, fields)
    if not name:
        return ", ".join(f"{one.label} {one.effect:+.2f}" for one in same)
    return f"{name} ({told})"


def _with_ratio(column: Column, fields: Sequence[str]) -> str:
    one = column.least
    assert one.ratio is not None
    name = named(column.place, fields)
    return f"{name} {one.ratio:.2f} ({one.label})".strip()
