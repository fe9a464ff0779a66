"""Print a comparison in a terminal, or write it as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gkd_lab.report.comparison import ComparedExample, Comparison, ScoreDifference

MAX_CHARACTERS = 400
"""Characters of a text that are printed."""


def format_comparison_json(comparison: Comparison) -> str:
    """Return all fields of a comparison as JSON text, texts whole; `effect` gets its `verdict`."""
    fields = asdict(comparison)
    fields["effect"]["verdict"] = comparison.effect.verdict
    return json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print records, differing settings, scores, verdict, notes and examples; long texts are cut."""
    console = console or Console()
    for part in _render_comparison(comparison):
        console.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)


def _render_comparison(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield what is printed, lines and rich tables, from top to bottom."""
    for name, record in (("A", comparison.a), ("B", comparison.b)):
        yield f"{name}: {record.role} {record.fingerprint}, {record.record}"
    if comparison.relation:
        yield comparison.relation
    yield _render_differences(comparison)
    names = ", ".join(comparison.other_evaluations)
    others = f" (also there: {names})" if names else ""
    yield f"{comparison.evaluation}/{comparison.metric}{others}; {comparison.signature}"
    yield _render_scores(comparison)
    yield _format_verdict(comparison.effect)
    for note in comparison.notes:
        yield f"note: {note}"
    count = len(comparison.examples)
    if count:
        yield f"the {count} of {comparison.differing} differing examples that differ most, of {comparison.n}"
    elif comparison.paired:
        yield f"no example of {comparison.n} scores differently"
    for example in comparison.examples:
        yield Rule(f"{example.number}", align="left", style="dim")
        yield _render_example(example)


def _render_differences(comparison: Comparison) -> RenderableType:
    """Return a table of the fields in which the specifications differ, or a sentence if none."""
    if not comparison.differs:
        return "their specifications do not differ"
    table = _create_table("differs in", "A", "B")
    for field in comparison.differs:
        table.add_row(field.name, Text(_format_value(field.a)), Text(_format_value(field.b)))
    return table


def _render_scores(comparison: Comparison) -> Table:
    """Return a table of A's score, B's score and B - A, each with interval and number of examples."""
    table = _create_table("", "score", "95 % interval over examples", "examples")
    for name, record in (("A", comparison.a), ("B", comparison.b)):
        interval = f"{record.low:.2f} to {record.high:.2f}"
        table.add_row(name, f"{record.score:.2f}", interval, str(record.n))
    low, high = comparison.effect.low, comparison.effect.high
    interval = "none" if low is None else f"{low:+.2f} to {high:+.2f}"
    table.add_row("B - A", f"{comparison.effect.mean:+.2f}", interval, str(comparison.n))
    return table


def _format_verdict(effect: ScoreDifference) -> str:
    """Format `B is higher (over <what the interval covers>)`, `B is lower` or `undecided`."""
    undecided = "undecided" if effect.low is None else "undecided, the interval holds 0"
    verdicts = {"higher": "B is higher", "lower": "B is lower", "undecided": undecided}
    return f"{verdicts[effect.verdict]} (over {effect.over})"


def _render_example(example: ComparedExample) -> Table:
    """Return a grid of prompt, references and both completions with their scores."""
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
    """Cut a text to `MAX_CHARACTERS` and show unprintable characters, all but newlines, as escapes."""
    left_out = len(text) - MAX_CHARACTERS
    escaped = "".join(
        character if character == "\n" or character.isprintable() else repr(character)[1:-1]
        for character in text[:MAX_CHARACTERS]
    )
    end = Text(f" ... ({left_out} more characters)", style="dim") if left_out > 0 else Text()
    return Text(escaped) + end if escaped else Text("(empty)", style="dim")


def _format_value(value: object) -> str:
    """Format a setting: None as `-`, a float by `:g`, anything else by `str`."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _create_table(*columns: str) -> Table:
    """Create an empty rich table without lines, with these column names."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
