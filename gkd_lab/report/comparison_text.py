"""A comparison for a terminal: the verdict first, then what differs, then the examples, long texts cut."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gkd_lab.report.comparison import Comparison, Example, Side
from gkd_lab.statistics.effects import Effect

LONGEST = 400
"""Characters of a text that are shown."""


def as_json(found: Comparison) -> str:
    """Every field, all examples' texts whole; `verdict` beside the effect."""
    facts = asdict(found)
    facts["effect"]["verdict"] = found.effect.verdict
    return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)


def show(found: Comparison, console: Console | None = None) -> None:
    """Print it."""
    console = console or Console()
    for part in _parts(found):
        console.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)


def _parts(found: Comparison) -> Iterator[RenderableType]:
    yield _side("A", found.a)
    yield _side("B", found.b)
    if found.relation:
        yield found.relation
    yield _differing(found)
    others = f" (also there: {', '.join(found.other_evaluations)})" if found.other_evaluations else ""
    yield f"{found.evaluation}/{found.metric}{others}; {found.signature}"
    yield _scores(found)
    yield _verdict(found.effect)
    for note in found.notes:
        yield f"note: {note}"
    if not found.paired:
        return
    count = len(found.examples)
    if not count:
        yield f"no example of {found.n} scores differently"
        return
    yield f"the {count} of {found.differing} differing examples that differ most, of {found.n}"
    for example in found.examples:
        yield Rule(f"{example.number}", align="left", style="dim")
        yield _example(example)


def _side(name: str, side: Side) -> str:
    return f"{name}: {side.role} {side.fingerprint}, {side.record}"


def _differing(found: Comparison) -> RenderableType:
    if not found.differs:
        return "their specifications do not differ"
    table = _table("differs in", "A", "B")
    for field in found.differs:
        table.add_row(field.name, Text(_said(field.a)), Text(_said(field.b)))
    return table


def _scores(found: Comparison) -> RenderableType:
    table = _table("", "score", "95 % interval", "examples")
    for name, side in (("A", found.a), ("B", found.b)):
        table.add_row(name, f"{side.score:.2f}", f"{side.low:.2f} to {side.high:.2f}", str(side.n))
    low, high = found.effect.low, found.effect.high
    ends = "none" if low is None else f"{low:+.2f} to {high:+.2f}"
    table.add_row("B - A", f"{found.effect.mean:+.2f}", ends, str(found.n))
    return table


def _verdict(effect: Effect) -> str:
    why = {
        "higher": "B is higher",
        "lower": "B is lower",
        "undecided": "undecided" if effect.low is None else "undecided, the interval holds 0",
    }
    return f"{why[effect.verdict]} ({effect.over})"


def _example(example: Example) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("prompt", readable(example.prompt))
    for text in example.references:
        table.add_row("reference", readable(text))
    table.add_row(f"A {example.score_a:.1f}", readable(example.a))
    table.add_row(f"B {example.score_b:.1f}", readable(example.b))
    return table


def readable(text: str) -> Text:
    """At most `LONGEST` characters; what could steer a terminal is shown as its code."""
    left_out = len(text) - LONGEST
    shown = "".join(one if one == "\n" or one.isprintable() else repr(one)[1:-1] for one in text[:LONGEST])
    end = Text(f" ... ({left_out} more characters)", style="dim") if left_out > 0 else Text()
    return Text(shown) + end if shown else Text("(empty)", style="dim")


def _said(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
