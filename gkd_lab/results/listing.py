"""An overview as lines of text: the same columns at any width, in a terminal and in a pipe."""

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from gkd_lab.results.overview import CellView, Overview
from gkd_lab.spec import GridOfCells

_COLOURS = {"done": "32", "failed": "31", "running": "33"}
_LEFT = {"cell", "task", "status", "experiment", "figures", "question"}


def cell_lines(grid: GridOfCells, found: Overview, *, progress: bool) -> Iterator[str]:
    """A header and a line for each cell; with its progress, or with its pack and its cost."""
    axes = [axis for axis in grid.axes if axis not in ("task", "lmbda", "beta", "seed")]
    more = ["step", "loss", "on policy"] if progress else ["pack", "alone, about"]
    header = ["cell", "task", "lmbda", "beta", "seed", *axes, "status", *more]
    rows = [
        [*_identity(view, axes), view.state, *(_progress(view) if progress else _cost(view))]
        for view in found.cells
    ]
    states = [view.state for view in found.cells]
    lines = aligned(header, rows)
    yield next(lines)
    for state, line in zip(states, lines, strict=True):
        yield _coloured(line, _COLOURS.get(state, ""))


def _identity(view: CellView, axes: Iterable[str]) -> list[str]:
    one = view.cell
    beta = "-" if one.beta is None else f"{one.beta:g}"
    own = [one.fingerprint, one.task, f"{one.lmbda:g}", beta, str(one.seed)]
    return own + [_value(one.labels[axis]) for axis in axes]


def _value(label: object) -> str:
    if isinstance(label, dict):
        return ",".join(f"{key}={_value(value)}" for key, value in label.items())
    return f"{label:g}" if isinstance(label, float) else str(label)


def _progress(view: CellView) -> list[str]:
    loss = "" if view.loss is None else f"{view.loss:.4g}"
    on_policy = "" if view.on_policy is None else f"{view.on_policy:.0%}"
    return [f"{view.step}/{view.cell.training.steps}", loss, on_policy]


def _cost(view: CellView) -> list[str]:
    return ["alone" if view.alone else str(view.pack), _about(view.seconds)]


def summary_lines(found: Overview) -> Iterator[str]:
    """Reference models, what is done and left, what collapses and what else should be known."""
    for view in found.artifacts:
        yield f"{view.role} {view.name}: {view.state}, about {_about(view.seconds)}"
    done = sum(view.state == "done" for view in found.cells)
    sizes = ", ".join(f"{_count(times, 'pack')} of {size}" for size, times in Counter(found.packs).items())
    yield f"{_count(len(found.cells), 'cell')}, {done} done; {sizes}"
    yield f"left to do, without decoding: about {_about(found.seconds_left)}"
    yield from found.collapsed
    yield from found.notes


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns two spaces apart, as wide as their widest entry; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<" if name in _LEFT else ">" for name in header]
    for n, row in enumerate((header, *rows)):
        cells = (f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=True))
        line = "  ".join(cells).rstrip()
        yield line if n else _coloured(line, "1")


def folded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows with their last column broken at the terminal's width; as they are in a pipe."""
    if not sys.stdout.isatty():
        return [list(row) for row in rows]
    *others, _ = zip(*rows, strict=True) if rows else [()]
    taken = sum(2 + max(map(len, column)) for column in others)
    width = max(30, shutil.get_terminal_size().columns - taken - 2)
    lines = []
    for *first, text in rows:
        for n, part in enumerate(textwrap.wrap(text, width) or [""]):
            lines.append([*([""] * len(first) if n else first), part])
    return lines


def _coloured(line: str, code: str) -> str:
    if not code or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return line
    return f"\033[{code}m{line}\033[0m"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
