"""Text and JSON of verdicts."""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from gkd_lab.claims.model_scores import ComparedModel
from gkd_lab.claims.model_settings import MODEL_SETTINGS, find_distinguishing_settings, format_settings
from gkd_lab.claims.verdicts import ClaimVerdict, JudgedColumn, JudgedContrast
from gkd_lab.statistics.power import MAX_SEEDS, needs_more_examples

UNJUDGED_PREFIX = "0 of 0; "
"""Start of an unjudged claim's detail: scripts read `k of n` in every detail."""
MAX_LISTED_MODELS = 8
"""Unfinished models that are listed by name."""
_COUNT_WORDS = {2: "two", 3: "three"}


# ---- detail ----


def format_detail(verdict: ClaimVerdict) -> str:
    """Format `k of n` columns that hold, the exceptions with their effects, and what is missing."""
    gaps = [*verdict.reasons, *_list_unfinished(verdict.unfinished), *verdict.problems]
    if not verdict.columns:
        return f"{UNJUDGED_PREFIX}cannot be judged: {'; '.join(gaps)}"
    missing = [f"not in the table: {', '.join(verdict.missing)}"] if verdict.missing else []
    counts = _format_measured if verdict.claim.is_measurement else _format_counts
    besides = [f"besides, {label}: {_format_counts(columns)}" for label, columns in verdict.besides.items()]
    return "; ".join([counts(verdict.columns), *missing, *gaps, *besides])


def format_summary(verdict: ClaimVerdict) -> str:
    """Format how many columns hold, what is missing and what would decide it, without the exceptions."""
    gaps = [*verdict.reasons, *_list_unfinished(verdict.unfinished), *verdict.problems]
    if not verdict.columns:
        return f"cannot be judged: {'; '.join(gaps)}"
    held = sum(column.outcome == "holds" for column in verdict.columns)
    counts = f"{held} of {len(verdict.columns)} hold" if len(verdict.columns) > 1 else ""
    if verdict.claim.is_measurement:
        counts = ""
    missing = [f"not in the table: {', '.join(verdict.missing)}"] if verdict.missing else []
    return "; ".join(filter(None, [counts, *missing, *gaps, format_decision(verdict)]))


def _format_measured(columns: Sequence[JudgedColumn]) -> str:
    """Format the effect of each column of a measurement."""
    names = find_distinguishing_settings([column.shared for column in columns])
    sign = "" if columns[0].weakest.ratio is not None else "+"
    parts = [f"{format_settings(c.shared, names)} {c.weakest.effect:{sign}.2f}".strip() for c in columns]
    return f"{len(columns)} of {len(columns)} measured, no verdict: {', '.join(parts)}"


def _format_counts(columns: Sequence[JudgedColumn]) -> str:
    """Format `54 of 55` columns that hold; then those that fail, tie or are undecided, and ratios."""
    names = find_distinguishing_settings([column.shared for column in columns])
    parts = [f"{sum(column.outcome == 'holds' for column in columns)} of {len(columns)}"]
    for outcome, word in (("fails", "fails"), ("tie", "ties"), ("undecided", "undecided")):
        exceptions = [_format_exception(column, names) for column in columns if column.outcome == outcome]
        parts += [f"{word}: {' | '.join(exceptions)}"] if exceptions else []
    ratios = [text for column in columns if (text := _format_ratio(column, names))]
    return "; ".join([*parts, f"ratios: {', '.join(ratios)}"] if ratios else parts)


def _format_exception(column: JudgedColumn, names: Sequence[str]) -> str:
    """Format a column that does not hold: its settings, and the effects of contrasts of its outcome."""
    deciding = [contrast for contrast in column.contrasts if contrast.outcome == column.outcome]
    effects = ", ".join(f"{contrast.label} {contrast.effect:+.2f}" for contrast in deciding)
    name = format_settings(column.shared, names)
    if not name:
        return effects
    return f"{name} ({effects if len(column.contrasts) > 1 else f'{deciding[0].effect:+.2f}'})"


def _format_ratio(column: JudgedColumn, names: Sequence[str]) -> str:
    """Format settings of a column with the ratio and the label of the contrast that has one; else nothing."""
    contrast = column.measured_ratio
    if contrast is None:
        return ""
    return f"{format_settings(column.shared, names)} {contrast.ratio:.2f} ({contrast.label})".strip()


def _list_unfinished(models: Sequence[ComparedModel]) -> list[str]:
    """Return one text in a list, `not done: a | b and 3 more`; an empty list without models."""
    distinct = find_distinguishing_settings([model.settings for model in models])
    names = dict.fromkeys(format_settings(model.settings, {*distinct, *MODEL_SETTINGS}) for model in models)
    others = f" and {len(names) - MAX_LISTED_MODELS} more" if len(names) > MAX_LISTED_MODELS else ""
    return [f"not done: {' | '.join(list(names)[:MAX_LISTED_MODELS])}{others}"] if names else []


# ---- rows ----

VERDICT_COLUMNS = ("id", "verdict", "effect", "low", "high", "n", "n_examples", "margin", "method", "detail")


def summarize_verdict(verdict: ClaimVerdict) -> dict[str, Any]:
    """Return the fields of a verdict that scripts rely on; None for numbers that it does not have."""
    judged = bool(verdict.columns)
    weakest = verdict.weakest if judged else None
    return {
        "id": verdict.claim.id,
        "verdict": verdict.verdict,
        "effect": verdict.effect,
        "low": verdict.low,
        "high": verdict.high,
        "n": 0 if weakest is None else weakest.estimate.seeds,
        "n_examples": None if weakest is None else weakest.estimate.examples,
        "margin": 0.0 if weakest is None else weakest.margin,
        "method": "" if weakest is None else weakest.estimate.method,
        "detail": format_detail(verdict),
    }


def list_contrast_rows(verdict: ClaimVerdict) -> list[dict[str, Any]]:
    """Return a row per contrast: column, label, outcome and every number that it rests on."""
    names = find_distinguishing_settings([column.shared for column in verdict.columns])
    return [
        {
            "column": format_settings(column.shared, names),
            "comparison": contrast.label,
            "outcome": contrast.outcome,
            "effect": _round_number(contrast.effect),
            "low": _round_number(contrast.low),
            "high": _round_number(contrast.high),
            "margin": contrast.margin,
            "n": contrast.estimate.seeds,
            "n_examples": contrast.estimate.examples,
            "method": contrast.estimate.method,
            "required_seeds": contrast.required_seeds,
        }
        for column in verdict.columns
        for contrast in column.contrasts
    ]


def encode_verdicts(verdicts: Sequence[ClaimVerdict]) -> str:
    """Return JSON text, a row per claim, with its `comparisons`.

    `id`, `verdict`, `effect`, `low`, `high`, `n` (seeds), `detail`, then `n_examples`, `margin`, `method`,
    `mean_effect` over all comparisons, `required_seeds`.
    """
    rows = []
    for verdict in verdicts:
        row = {name: _round_number(value) for name, value in summarize_verdict(verdict).items()}
        row["detail"] = row.pop("detail")
        row["mean_effect"] = _round_number(verdict.mean_effect)
        row["required_seeds"] = verdict.required_seeds
        row["comparisons"] = list_contrast_rows(verdict)
        rows.append(row)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]"


def _round_number(value: Any) -> Any:
    """Round a float to 9 digits, which drops the noise of binary fractions; else return it as it is."""
    return round(value, 9) if isinstance(value, float) else value


# ---- text ----


def format_verdict(verdict: ClaimVerdict) -> str:
    """Return `holds`, `fails`, `undecided`, `measured` (a claim to measure only) or `not judged`."""
    if not verdict.columns:
        return "not judged"
    return "measured" if verdict.claim.is_measurement else verdict.verdict


def format_interval(effect: float | None, low: float | None, high: float | None) -> str:
    """Format `+1.20 [+0.40, +2.00]`, `+1.20` without interval; empty without effect."""
    if effect is None:
        return ""
    return f"{effect:+.2f}" if low is None or high is None else f"{effect:+.2f} [{low:+.2f}, {high:+.2f}]"


def format_effect(verdict: ClaimVerdict) -> str:
    """Format a verdict's effect and interval; a measured ratio as `1.98 times`."""
    if verdict.claim.is_measurement and verdict.columns and verdict.weakest.ratio is not None:
        return f"{verdict.effect:.2f} times"
    return format_interval(verdict.effect, verdict.low, verdict.high)


def format_basis(contrast: JudgedContrast) -> str:
    """Format what an interval rests on: `margin 0.3; 5 seeds x 500 examples, crossed`."""
    margin = f"margin {contrast.margin:g}; " if contrast.margin else ""
    return f"{margin}{contrast.estimate.method}"


def format_decision(verdict: ClaimVerdict) -> str:
    """Format how many seeds would probably decide an undecided verdict; empty for others."""
    undecided = [c for c in verdict.contrasts if c.outcome == "undecided"]
    if verdict.verdict != "undecided" or verdict.claim.is_measurement or not undecided:
        return ""
    least = max((c.min_seeds for c in undecided if c.estimate.seeds < c.min_seeds), default=None)
    if least is not None:
        return f"{_COUNT_WORDS[least]} seeds or more are needed for a verdict"
    seeds = verdict.required_seeds
    if seeds is not None:
        return f"about {seeds} seeds would probably decide it (80 % power, if the effects are as measured)"
    if any(contrast.low is None for contrast in undecided):
        return ""  # the method says why its noise is not known
    if any(needs_more_examples(contrast.estimate, contrast.margin) for contrast in undecided):
        return "more seeds alone would probably not decide it: the test examples are too few"
    target = "its margin" if any(contrast.margin for contrast in undecided) else "0"
    return f"more than {MAX_SEEDS} seeds would be needed: the effect is too near to {target}"


def format_verdict_lines(verdicts: Sequence[ClaimVerdict], named_claims: Sequence[str] = ()) -> Iterator[str]:
    """Yield a block per judged or named claim, then a line per other claim with its reason."""
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    shown = [verdict for verdict in verdicts if verdict.columns or verdict.claim.id in named_claims]
    for verdict in shown:
        head = f"{verdict.claim.id:<4} {format_verdict(verdict):<10} "
        yield from _wrap_text(head, f"{verdict.claim.statement} ({verdict.claim.source})", width)
        for text in _list_texts(verdict):
            yield from _wrap_text(" " * len(head), text, width)
    unjudged = [verdict for verdict in verdicts if verdict not in shown]
    if unjudged:
        yield ""
        yield "not judged:"
        for verdict in unjudged:
            reason = format_detail(verdict).removeprefix(UNJUDGED_PREFIX + "cannot be judged: ")
            yield from _wrap_text(f"{verdict.claim.id:<4} ", reason, width)


def _list_texts(verdict: ClaimVerdict) -> list[str]:
    """Return the texts below a claim's statement: the numbers, what they rest on, exceptions, what to do."""
    detail = format_detail(verdict).removeprefix(UNJUDGED_PREFIX)
    if not verdict.columns:
        return [detail]
    which = "" if len(verdict.contrasts) == 1 else f", the weakest of {len(verdict.contrasts)}"
    which = "" if verdict.claim.is_measurement else which
    basis = format_basis(verdict.weakest)
    texts = [f"{format_effect(verdict)}{which} ({basis})", detail, format_decision(verdict)]
    return [text for text in texts if text]


def _wrap_text(head: str, text: str, width: int) -> list[str]:
    """Wrap a text into lines of `width` behind `head`; later lines are indented by its length."""
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))
