"""An overview as lines of text: the same columns at any width, in a terminal and in a pipe."""

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, get_args

from gkd_lab.config import GridOfCells
from gkd_lab.config.cost import NOMINAL_RATE
from gkd_lab.status.overview import CellView, Overview
from gkd_lab.store import State
from gkd_lab.tables.loss_labels import loss_label

_STATES: tuple[State, ...] = get_args(State)
_COLOURS = {"done": "32", "failed": "31", "running": "33"}
_LEFT = {"cell", "task", "status", "owner", "experiment", "figures", "question", "from"}
_PROGRESS = ["owner", "step", "loss", "on policy", "tokens/s", "left"]
_COST = ["pack", "about", "from"]


def cell_lines(
    grid: GridOfCells, found: Overview, *, progress: bool, only: Container[State] = _STATES
) -> Iterator[str]:
    """A header and a line for each cell in one of the states; with its progress, or its pack and its cost."""
    axes = [axis for axis in grid.axes if axis not in ("task", "lmbda", "beta", "seed")]
    more = _PROGRESS if progress else _COST
    header = ["cell", "task", "lmbda", "beta", "seed", *axes, "status", *more]
    shown = [view for view in found.cells if view.state in only]
    rows = [
        [*_identity(view, axes), view.state, *(_progress(view) if progress else _cost(view))]
        for view in shown
    ]
    states = [view.state for view in shown]
    lines = aligned(header, rows)
    yield next(lines)
    for state, line in zip(states, lines, strict=True):
        yield _coloured(line, _COLOURS.get(state, ""))


def _identity(view: CellView, axes: Iterable[str]) -> list[str]:
    one = view.cell
    beta = "-" if one.beta is None else f"{one.beta:g}"
    own = [one.fingerprint, one.task, f"{one.lmbda:g}", beta, str(one.seed)]
    return own + [_value(axis, one.labels[axis]) for axis in axes]


def _value(axis: str, label: Any) -> str:
    if axis == "objectives":
        return loss_label(label)
    if isinstance(label, dict):
        return ",".join(f"{key}={_value(key, value)}" for key, value in label.items())
    return f"{label:g}" if isinstance(label, float) else str(label)


def _progress(view: CellView) -> list[str]:
    now = view.now
    return [
        now.owner or "",
        f"{now.step}/{view.cell.training.steps}",
        "" if now.loss is None else f"{now.loss:.4g}",
        "" if now.on_policy is None else f"{now.on_policy:.0%}",
        "" if now.tokens_per_second is None else f"{now.tokens_per_second:.0f}",
        "" if now.seconds_left is None else _about(now.seconds_left),
    ]


def _cost(view: CellView) -> list[str]:
    basis = "" if view.basis == "nothing" else view.basis
    return ["alone" if view.alone else str(view.pack), _about(view.seconds), basis]


def failure_lines(found: Overview) -> Iterator[str]:
    """What failed: where, the last line of its error, the file with its traceback."""
    for view in found.cells:
        if view.error:
            yield f"failed: {view.cell.folder}: {view.error} (see {view.now.log})"
    for one in found.artifacts:
        if one.error:
            yield f"failed: {one.role} {one.name}: {one.error} (see {one.log})"


def reference_lines(found: Overview) -> Iterator[str]:
    """The reference models that are being built, which cells wait for."""
    for one in found.artifacts:
        if one.state == "running":
            yield f"{one.role} {one.name}: running"


def standing_line(found: Overview) -> str:
    """`3 done, 2 running, 10 missing; left to do, without decoding: about 4 min`."""
    counts = Counter(view.state for view in found.cells)
    states = ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state])
    return f"{states}; left to do, without decoding: about {_about(found.seconds_left)}"


def summary_lines(found: Overview) -> Iterator[str]:
    """Reference models, what is done and left, what collapses and what else should be known."""
    for view in found.artifacts:
        yield f"{view.role} {view.name}: {view.state}, about {_about(view.seconds)}"
    done = sum(view.state == "done" for view in found.cells)
    sizes = ", ".join(f"{_count(times, 'pack')} of {size}" for size, times in Counter(found.packs).items())
    yield f"{_count(len(found.cells), 'cell')}, {done} done; {sizes}"
    yield f"left to do, without decoding: about {_about(found.seconds_left)}"
    yield from _bases(found)
    yield from found.collapsed
    yield from found.notes


def _bases(found: Overview) -> Iterator[str]:
    """What the estimates of a cell's time rest on."""
    counts = Counter(view.basis for view in found.cells)
    if counts["finished cells"]:
        yield f"time of {_count(counts['finished cells'], 'cell')}: as {found.learnt_from} took"
    if counts["FLOPs"]:
        rate = f"{NOMINAL_RATE / 1e9:.0f} GFLOP/s, two CPU cores on nano models"
        yield f"time of {_count(counts['FLOPs'], 'cell')}: of one alone, from its FLOPs at {rate}"
    if counts["nothing"]:
        why = "the size of a model is not known before it is here"
        yield f"time of {_count(counts['nothing'], 'cell')}: unknown, {why}"


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
