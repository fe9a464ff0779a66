"""Verdicts as text to read and as JSON for scripts."""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from gkd_lab.claims.judge import Finding
from gkd_lab.claims.missing import NOTHING


def as_json(findings: Sequence[Finding]) -> str:
    """A list of `id`, `verdict`, `effect`, `low`, `high`, `n` (columns judged) and `detail`."""
    rows = [
        {
            "id": one.claim.id,
            "verdict": one.verdict,
            "effect": _rounded(one.effect),
            "low": _rounded(one.low),
            "high": _rounded(one.high),
            "n": one.n,
            "detail": one.detail,
        }
        for one in findings
    ]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]"


def _rounded(value: float | None) -> float | None:
    """Further digits are those of binary fractions."""
    return None if value is None else round(value, 9)


def verdict_of(finding: Finding) -> str:
    """`holds`, `fails`, `undecided`; `measured` and `not judged` where there is no verdict to give."""
    if not finding.judged:
        return "not judged"
    return "measured" if finding.claim.measured else finding.verdict


def effect_of(finding: Finding) -> str:
    """`+1.2 [+0.4, +2.0]`, without brackets where there is no interval."""
    if finding.effect is None:
        return ""
    if any(column.least.ratio is not None for column in finding.columns) and finding.claim.measured:
        return f"{finding.effect:.2f} times"
    ends = "" if finding.low is None else f" [{finding.low:+.2f}, {finding.high:+.2f}]"
    return f"{finding.effect:+.2f}{ends}"


def text_lines(findings: Sequence[Finding], asked: Sequence[str] = ()) -> Iterator[str]:
    """A block for each claim that was judged or asked for; the others in a line each, last."""
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    shown = [one for one in findings if one.judged or one.claim.id in asked]
    for one in shown:
        head = f"{one.claim.id:<4} {verdict_of(one):<10} "
        yield from _wrapped(head, f"{one.claim.statement} ({one.claim.where})", width)
        detail = one.detail.removeprefix(NOTHING)
        said = f"{effect_of(one)}; {detail}" if effect_of(one) else detail
        yield from _wrapped(" " * len(head), said, width)
    rest = [one for one in findings if one not in shown]
    if rest:
        yield ""
        yield "not judged:"
        for one in rest:
            yield from _wrapped(
                f"{one.claim.id:<4} ", one.detail.removeprefix(NOTHING + "cannot be judged: "), width
            )


def _wrapped(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))
