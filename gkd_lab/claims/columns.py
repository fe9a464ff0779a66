"""Columns in numbers and in words: what was compared, how it came out, which ones are exceptions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gkd_lab.claims.facts import FigureCell
from gkd_lab.claims.place_names import find_distinguishing_fields, format_fields
from gkd_lab.statistics.bootstrap import Array

ContrastOutcome = Literal["holds", "fails", "undecided", "tie"]

_OUTCOMES_WORST_FIRST: tuple[ContrastOutcome, ...] = ("fails", "undecided", "tie", "holds")


@dataclass(frozen=True)
class JudgedContrast:
    """One comparison in numbers."""

    label: str
    outcome: ContrastOutcome
    effect: float
    low: float | None
    high: float | None
    seed_effects: dict[int, float]
    resampled_effects: Array | None
    ratio: float | None


@dataclass(frozen=True)
class Column:
    """All comparisons of one column; the least of them stands for it."""

    shared_fields: FigureCell
    contrasts: list[JudgedContrast]
    missing_models: list[str]
    """Models that the check asks for and the table does not."""
    unfinished_cells: list[FigureCell]
    """Those of its places that have no score yet."""

    @property
    def outcome(self) -> ContrastOutcome:
        return min((one.outcome for one in self.contrasts), key=_OUTCOMES_WORST_FIRST.index)

    @property
    def weakest(self) -> JudgedContrast:
        return min(self.contrasts, key=lambda one: one.effect)


def format_columns(columns: Sequence[Column], measured: bool) -> str:
    """All columns in a sentence: counts and exceptions, or numbers where there is no verdict."""
    if not measured:
        return format_counts(columns)
    fields = find_distinguishing_fields([column.shared_fields for column in columns])
    sign = "" if columns[0].weakest.ratio is not None else "+"
    parts = [
        f"{format_fields(c.shared_fields, fields)} {c.weakest.effect:{sign}.2f}".strip() for c in columns
    ]
    return f"{len(columns)} of {len(columns)} measured, no verdict: {', '.join(parts)}"


def format_counts(columns: Sequence[Column]) -> str:
    """`54 of 55`, and the exceptions by name; ratios where the claim is about one."""
    fields = find_distinguishing_fields([column.shared_fields for column in columns])
    held = sum(column.outcome == "holds" for column in columns)
    parts = [f"{held} of {len(columns)}"]
    for outcome, word in (("fails", "fails"), ("tie", "ties"), ("undecided", "undecided")):
        names = [_format_exception(column, fields) for column in columns if column.outcome == outcome]
        parts += [f"{word}: {' | '.join(names)}"] if names else []
    ratios = [_format_ratio(column, fields) for column in columns if column.weakest.ratio is not None]
    parts += [f"ratios: {', '.join(ratios)}"] if ratios else []
    return "; ".join(parts)


def _format_exception(column: Column, fields: Sequence[str]) -> str:
    same = [one for one in column.contrasts if one.outcome == column.outcome]
    told = ", ".join(f"{one.label} {one.effect:+.2f}" for one in same)
    if len(column.contrasts) == 1:
        told = f"{same[0].effect:+.2f}"
    name = format_fields(column.shared_fields, fields)
    if not name:
        return ", ".join(f"{one.label} {one.effect:+.2f}" for one in same)
    return f"{name} ({told})"


def _format_ratio(column: Column, fields: Sequence[str]) -> str:
    one = column.weakest
    assert one.ratio is not None
    name = format_fields(column.shared_fields, fields)
    return f"{name} {one.ratio:.2f} ({one.label})".strip()
