"""Verdicts on claims: judged columns, and their form as text and as JSON."""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gkd_lab.claims.claim_checks import Check
from gkd_lab.claims.definitions import Claim
from gkd_lab.claims.figure_cells import (
    MODEL_FIELDS,
    FigureCell,
    find_distinguishing_fields,
    format_field,
    format_fields,
    meets_conditions,
)
from gkd_lab.claims.measurements import Measurement
from gkd_lab.tables.example_statistics import Array

Verdict = Literal["holds", "fails", "undecided"]
ContrastOutcome = Literal["holds", "fails", "undecided", "tie"]

_OUTCOMES_WORST_FIRST: tuple[ContrastOutcome, ...] = ("fails", "undecided", "tie", "holds")


@dataclass(frozen=True)
class JudgedContrast:
    """A contrast's effect with its interval and outcome."""

    label: str
    outcome: ContrastOutcome
    effect: float
    """Mean over seeds."""
    low: float | None
    high: float | None
    seed_effects: dict[int, float]
    resampled_effects: Array | None
    """(R,) effects on resampled examples, of a single seed."""
    ratio: float | None


@dataclass(frozen=True)
class Column:
    """All contrasts of one column; the weakest stands for the column."""

    shared_fields: FigureCell
    contrasts: list[JudgedContrast]
    missing_models: list[str]
    """Models that the check names and the table lacks."""
    unfinished_cells: list[FigureCell]
    """Figure cells of the contrasts that have no score yet."""

    @property
    def outcome(self) -> ContrastOutcome:
        """Worst outcome of the contrasts; worst first: fails, undecided, tie, holds."""
        return min((contrast.outcome for contrast in self.contrasts), key=_OUTCOMES_WORST_FIRST.index)

    @property
    def weakest(self) -> JudgedContrast:
        """Contrast with the smallest effect; it need not be the one that decides the outcome."""
        return min(self.contrasts, key=lambda contrast: contrast.effect)


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim's verdict over all of its columns."""

    claim: Claim
    verdict: Verdict
    detail: str
    effect: float | None = None
    """Mean over columns of the weakest contrast, in points; a ratio for C26."""
    low: float | None = None
    high: float | None = None
    columns: list[Column] = field(default_factory=list)
    """Columns that were judged; none if nothing could be judged."""

    @property
    def is_judged(self) -> bool:
        """Whether there was a column to judge the claim on."""
        return bool(self.columns)


# ---- text and JSON ----

UNJUDGED_PREFIX = "0 of 0; "
"""Start of an unjudged claim's detail: scripts read `k of n` in every detail."""


def encode_verdicts(verdicts: Sequence[ClaimVerdict]) -> str:
    """Return JSON text, a row per claim: `id`, `verdict`, `effect`, `low`, `high`, `n`, `detail`.

    `n` counts the columns judged.
    """
    rows = [
        {
            "id": verdict.claim.id,
            "verdict": verdict.verdict,
            "effect": _round_number(verdict.effect),
            "low": _round_number(verdict.low),
            "high": _round_number(verdict.high),
            "n": len(verdict.columns),
            "detail": verdict.detail,
        }
        for verdict in verdicts
    ]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]"


def _round_number(value: float | None) -> float | None:
    """Round to 9 digits, which drops the noise of binary fractions; None stays None."""
    return None if value is None else round(value, 9)


def format_verdict(verdict: ClaimVerdict) -> str:
    """Return `holds`, `fails`, `undecided`, `measured` (a claim to measure only) or `not judged`."""
    if not verdict.is_judged:
        return "not judged"
    return "measured" if verdict.claim.is_measurement else verdict.verdict


def format_effect(verdict: ClaimVerdict) -> str:
    """Format `+1.20 [+0.40, +2.00]`, `+1.20` without interval, a ratio as `1.98 times`; empty if none."""
    if verdict.effect is None:
        return ""
    if verdict.claim.is_measurement and any(column.weakest.ratio is not None for column in verdict.columns):
        return f"{verdict.effect:.2f} times"
    interval = "" if verdict.low is None else f" [{verdict.low:+.2f}, {verdict.high:+.2f}]"
    return f"{verdict.effect:+.2f}{interval}"


def format_verdict_lines(verdicts: Sequence[ClaimVerdict], named_claims: Sequence[str] = ()) -> Iterator[str]:
    """Yield a block per judged or named claim, then a line per other claim with its reason."""
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    shown = [verdict for verdict in verdicts if verdict.is_judged or verdict.claim.id in named_claims]
    for verdict in shown:
        head = f"{verdict.claim.id:<4} {format_verdict(verdict):<10} "
        yield from _wrap_text(head, f"{verdict.claim.statement} ({verdict.claim.source})", width)
        parts = [format_effect(verdict), verdict.detail.removeprefix(UNJUDGED_PREFIX)]
        yield from _wrap_text(" " * len(head), "; ".join(filter(None, parts)), width)
    unjudged = [verdict for verdict in verdicts if verdict not in shown]
    if unjudged:
        yield ""
        yield "not judged:"
        for verdict in unjudged:
            reason = verdict.detail.removeprefix(UNJUDGED_PREFIX + "cannot be judged: ")
            yield from _wrap_text(f"{verdict.claim.id:<4} ", reason, width)


def _wrap_text(head: str, text: str, width: int) -> list[str]:
    """Wrap a text into lines of `width` behind `head`; later lines are indented by its length."""
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))


# ---- detail: columns ----


def format_columns(columns: Sequence[Column], is_measurement: bool) -> str:
    """Format a claim's detail: `format_counts`, or for a measurement the effect of each column."""
    if not is_measurement:
        return format_counts(columns)
    fields = find_distinguishing_fields([column.shared_fields for column in columns])
    sign = "" if columns[0].weakest.ratio is not None else "+"
    parts = [
        f"{format_fields(column.shared_fields, fields)} {column.weakest.effect:{sign}.2f}".strip()
        for column in columns
    ]
    return f"{len(columns)} of {len(columns)} measured, no verdict: {', '.join(parts)}"


def format_counts(columns: Sequence[Column]) -> str:
    """Format `54 of 55` columns that hold; then those that fail, tie or are undecided, and ratios."""
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
    """Format a column that does not hold: its fields, and the effects of contrasts of its outcome."""
    deciding = [contrast for contrast in column.contrasts if contrast.outcome == column.outcome]
    effects = ", ".join(f"{contrast.label} {contrast.effect:+.2f}" for contrast in deciding)
    name = format_fields(column.shared_fields, fields)
    if not name:
        return effects
    return f"{name} ({effects if len(column.contrasts) > 1 else f'{deciding[0].effect:+.2f}'})"


def _format_ratio(column: Column, fields: Sequence[str]) -> str:
    """Format fields of a column with the ratio and the label of its weakest contrast."""
    name = format_fields(column.shared_fields, fields)
    return f"{name} {column.weakest.ratio:.2f} ({column.weakest.label})".strip()


# ---- detail: what is missing ----

MAX_LISTED_CELLS = 8
"""Unfinished cells that are listed by name."""

_MEASURE_DESCRIPTIONS = {
    "quality": "score",
    "self_bleu": "Self-BLEU (an evaluation with samples and the metric self_bleu)",
    "entailment": "entailment (a reward here, not a score)",
    "step_time": "times of cells that were trained alone (`run --pack off`)",
}


def format_unjudged(reasons: Sequence[str], unfinished_cells: Sequence[FigureCell] = ()) -> str:
    """Format the detail of a claim without verdict: `0 of 0; cannot be judged: <reasons>`."""
    parts = [*reasons, *_list_unfinished(unfinished_cells)]
    return f"{UNJUDGED_PREFIX}cannot be judged: {'; '.join(parts)}"


def list_gaps(
    missing_models: Sequence[str], reasons: Sequence[str], unfinished_cells: Sequence[FigureCell]
) -> list[str]:
    """List texts on what a verdict lacked: missing models, the reasons given, unfinished cells."""
    missing = [f"not in the table: {', '.join(missing_models)}"] if missing_models else []
    return [*missing, *reasons, *_list_unfinished(unfinished_cells)]


def _list_unfinished(figure_cells: Sequence[FigureCell]) -> list[str]:
    """Return one text in a list, `not done: a | b and 3 more`; an empty list without cells."""
    fields = {*find_distinguishing_fields(figure_cells), *MODEL_FIELDS}
    names = list(dict.fromkeys(format_fields(figure_cell, fields) for figure_cell in figure_cells))
    others = f" and {len(names) - MAX_LISTED_CELLS} more" if len(names) > MAX_LISTED_CELLS else ""
    return [f"not done: {' | '.join(names[:MAX_LISTED_CELLS])}{others}"] if names else []


def explain_missing_data(check: Check, measurements: Sequence[Measurement]) -> str:
    """Return a text on the first condition of a check, task first, that leaves no trained cell."""
    if not measurements:
        return "no cells"
    conditions = {"measure": "quality", **check.conditions}
    remaining = [measurement.figure_cell for measurement in measurements]
    remaining = [figure_cell for figure_cell in remaining if figure_cell["role"] == "cell"]
    for name in sorted(conditions, key=lambda name: name != "task"):
        condition = conditions[name]
        remaining = [cell for cell in remaining if meets_conditions(cell, {name: condition})]
        if not remaining:
            return f"no {_format_condition(name, condition)}"
    wanted = (_format_condition(name, condition) for name, condition in check.conditions.items())
    return f"no cells in which all of this is so: {', '.join(wanted)}"


def _format_condition(name: str, condition: Any) -> str:
    """Format cells, evaluation or axis that meets a condition, such as `cells of task arithmetic`."""
    if name == "measure":
        return _MEASURE_DESCRIPTIONS[condition]
    if name == "task":
        return f"cells of task {condition}"
    if name == "pair":
        student = (
            "student as large as its teacher" if condition == "self" else "student smaller than its teacher"
        )
        return f"cells with a {student}"
    if name == "decoding":
        return "evaluation by sampling" if condition == "sample" else f"evaluation by {condition} decoding"
    if name == "train_share":
        return "axis train_rows"
    if name == "alpha":
        return "cells with a reward (settings reward and alpha)"
    if callable(condition):
        return f"cells with the asked for {name}"
    options = condition if isinstance(condition, tuple) else (condition,)
    return "cells with " + " or ".join(format_field(name, option) or str(option) for option in options)
