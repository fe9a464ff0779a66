"""A comparison for a terminal: the verdict first, then what differs, then the examples, long texts cut."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gkd_lab.report.comparison import ComparedExample, ComparedRecord, Comparison
from gkd_lab.statistics.effects import Effect

MAX_CHARACTERS = 400
"""Characters of a text that are shown."""


def format_comparison_json(comparison: Comparison) -> str:
    """Every field, all examples' texts whole; `verdict` beside the effect."""
    facts = asdict(comparison)
    facts["effect"]["verdict"] = comparison.effect.verdict
    return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print it."""
    console = console or Console()
    for part in _render_parts(comparison):
        console.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)


def _render_parts(comparison: Comparison) -> Iterator[RenderableType]:
    yield _format_record("A", comparison.a)
    yield _format_record("B", comparison.b)
    if comparison.relation:
        yield comparison.relation
    yield _render_differences(comparison)
    others = (
        f" (also there: {', '.join(comparison.other_evaluations)})" if comparison.other_evaluations else ""
    )
    yield f"{comparison.evaluation}/{comparison.metric}{others}; {comparison.signature}"
    yield _render_scores(comparison)
    yield _format_verdict(comparison.effect)
    for note in comparison.notes:
        yield f"note: {note}"
    if not comparison.paired:
        return
    count = len(comparison.examples)
    if not count:
        yield f"no example of {comparison.n} scores differently"
        return
    yield f"the {count} of {comparison.differing} differing examples that differ most, of {comparison.n}"
    for example in comparison.examples:
        yield Rule(f"{example.number}", align="left", style="dim")
        yield _render_example(example)


def _format_record(name: str, record: ComparedRecord) -> str:
    return f"{name}: {record.role} {record.fingerprint}, {record.record}"


def _render_differences(comparison: Comparison) -> RenderableType:
    if not comparison.differs:
        return "their specifications do not differ"
    table = _create_table("differs in", "A", "B")
    for field in comparison.differs:
        table.add_row(field.name, Text(_format_value(field.a)), Text(_format_value(field.b)))
    return table


def _render_scores(comparison: Comparison) -> RenderableType:
    table = _create_table("", "score", "95 % interval", "examples")
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        table.add_row(name, f"{side.score:.2f}", f"{side.low:.2f} to {side.high:.2f}", str(side.n))
    low, high = comparison.effect.low, comparison.effect.high
    ends = "none" if low is None else f"{low:+.2f} to {high:+.2f}"
    table.add_row("B - A", f"{comparison.effect.mean:+.2f}", ends, str(comparison.n))
    return table


def _format_verdict(effect: Effect) -> str:
    why = {
        "higher": "B is higher",
        "lower": "B is lower",
        "undecided": "undecided" if effect.low is None else "undecided, the interval holds 0",
    }
    return f"{why[effect.verdict]} ({effect.over})"


def _render_example(example: ComparedExample) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("prompt", escape_text(example.prompt))
    for text in example.references:
        table.add_row("reference", escape_text(text))
    table.add_row(f"A {example.score_a:.1f}", escape_text(example.a))
    table.add_row(f"B {example.score_b:.1f}", escape_text(example.b))
    return table


def escape_text(text: str) -> Text:
    """At most `LONGEST` characters; what could steer a terminal is shown as its code."""
    left_out = len(text) - MAX_CHARACTERS
    shown = "".join(
        one if one == "\n" or one.isprintable() else repr(one)[1:-1] for one in text[:MAX_CHARACTERS]
    )
    end = Text(f" ... ({left_out} more characters)", style="dim") if left_out > 0 else Text()
    return Text(shown) + end if shown else Text("(empty)", style="dim")


def _format_value(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _create_table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
