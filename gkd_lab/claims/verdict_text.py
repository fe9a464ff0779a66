"""Verdicts as text to read and as JSON for scripts."""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from gkd_lab.claims.judge import ClaimVerdict
from gkd_lab.claims.missing import UNJUDGED_PREFIX


def encode_verdicts(verdicts: Sequence[ClaimVerdict]) -> str:
    """A list of `id`, `verdict`, `effect`, `low`, `high`, `n` (columns judged) and `detail`."""
    rows = [
        {
            "id": one.claim.id,
            "verdict": one.verdict,
            "effect": _round_number(one.effect),
            "low": _round_number(one.low),
            "high": _round_number(one.high),
            "n": one.column_count,
            "detail": one.detail,
        }
        for one in verdicts
    ]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]"


def _round_number(value: float | None) -> float | None:
    """Further digits are those of binary fractions."""
    return None if value is None else round(value, 9)


def format_verdict(verdict: ClaimVerdict) -> str:
    """`holds`, `fails`, `undecided`; `measured` and `not judged` where there is no verdict to give."""
    if not verdict.is_judged:
        return "not judged"
    return "measured" if verdict.claim.is_measurement else verdict.verdict


def format_effect(verdict: ClaimVerdict) -> str:
    """`+1.2 [+0.4, +2.0]`, without brackets where there is no interval."""
    if verdict.effect is None:
        return ""
    if any(column.weakest.ratio is not None for column in verdict.columns) and verdict.claim.is_measurement:
        return f"{verdict.effect:.2f} times"
    ends = "" if verdict.low is None else f" [{verdict.low:+.2f}, {verdict.high:+.2f}]"
    return f"{verdict.effect:+.2f}{ends}"


def format_verdict_lines(verdicts: Sequence[ClaimVerdict], named_claims: Sequence[str] = ()) -> Iterator[str]:
    """A block for each claim that was judged or asked for; the others in a line each, last."""
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    shown = [one for one in verdicts if one.is_judged or one.claim.id in named_claims]
    for one in shown:
        head = f"{one.claim.id:<4} {format_verdict(one):<10} "
        yield from _wrap_text(head, f"{one.claim.statement} ({one.claim.source})", width)
        detail = one.detail.removeprefix(UNJUDGED_PREFIX)
        said = f"{format_effect(one)}; {detail}" if format_effect(one) else detail
        yield from _wrap_text(" " * len(head), said, width)
    rest = [one for one in verdicts if one not in shown]
    if rest:
        yield ""
        yield "not judged:"
        for one in rest:
            yield from _wrap_text(
                f"{one.claim.id:<4} ", one.detail.removeprefix(UNJUDGED_PREFIX + "cannot be judged: "), width
            )


def _wrap_text(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))
