"""An overview as lines of text: the same columns at any width, in a terminal and in a pipe."""

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, get_args

from gkd_lab.config import Grid
from gkd_lab.config.cost import NOMINAL_FLOPS_PER_SECOND
from gkd_lab.status.overview import CellView, Overview
from gkd_lab.store import State
from gkd_lab.tables.loss_labels import loss_label

_STATES: tuple[State, ...] = get_args(State)
_STATE_COLOURS = {"done": "32", "failed": "31", "running": "33"}
_LEFT_ALIGNED_COLUMNS = {"cell", "task", "status", "owner", "experiment", "figures", "question", "from"}
_PROGRESS_COLUMNS = ["owner", "step", "loss", "on policy", "tokens/s", "left"]
_COST_COLUMNS = ["pack", "about", "from"]


def render_cells(
    grid: Grid, overview: Overview, *, show_progress: bool, only: Container[State] = _STATES
) -> Iterator[str]:
    """A header and a line for each cell in one of the states; with its progress, or its pack and its cost."""
    axes = [axis for axis in grid.axes if axis not in ("task", "lmbda", "beta", "seed")]
    more = _PROGRESS_COLUMNS if show_progress else _COST_COLUMNS
    header = ["cell", "task", "lmbda", "beta", "seed", *axes, "status", *more]
    shown = [view for view in overview.cells if view.state in only]
    rows = [
        [
            *_format_identity(view, axes),
            view.state,
            *(_format_progress(view) if show_progress else _format_cost(view)),
        ]
        for view in shown
    ]
    states = [view.state for view in shown]
    lines = align_columns(header, rows)
    yield next(lines)
    for state, line in zip(states, lines, strict=True):
        yield _add_colour(line, _STATE_COLOURS.get(state, ""))


def _format_identity(view: CellView, axes: Iterable[str]) -> list[str]:
    one = view.cell
    beta = "-" if one.beta is None else f"{one.beta:g}"
    own = [one.fingerprint, one.task, f"{one.lmbda:g}", beta, str(one.seed)]
    return own + [_format_axis_value(axis, one.labels[axis]) for axis in axes]


def _format_axis_value(axis: str, label: Any) -> str:
    if axis == "objectives":
        return loss_label(label)
    if isinstance(label, dict):
        return ",".join(f"{key}={_format_axis_value(key, value)}" for key, value in label.items())
    return f"{label:g}" if isinstance(label, float) else str(label)


def _format_progress(view: CellView) -> list[str]:
    now = view.progress
    return [
        now.owner or "",
        f"{now.step}/{view.cell.training.steps}",
        "" if now.loss is None else f"{now.loss:.4g}",
        "" if now.on_policy is None else f"{now.on_policy:.0%}",
        "" if now.tokens_per_second is None else f"{now.tokens_per_second:.0f}",
        "" if now.seconds_left is None else _format_duration(now.seconds_left),
    ]


def _format_cost(view: CellView) -> list[str]:
    basis = "" if view.estimate_basis == "nothing" else view.estimate_basis
    return [
        "alone" if view.unpacked_reason else str(view.pack),
        _format_duration(view.estimated_seconds),
        basis,
    ]


def render_failures(overview: Overview) -> Iterator[str]:
    """What failed: where, the last line of its error, the file with its traceback."""
    for view in overview.cells:
        if view.error:
            yield f"failed: {view.cell.folder}: {view.error} (see {view.progress.error_file})"
    for one in overview.artifacts:
        if one.error:
            yield f"failed: {one.role} {one.name}: {one.error} (see {one.error_file})"


def render_running_artifacts(overview: Overview) -> Iterator[str]:
    """The reference models that are being built, which cells wait for."""
    for one in overview.artifacts:
        if one.state == "running":
            yield f"{one.role} {one.name}: running"


def render_state_counts(overview: Overview) -> str:
    """`3 done, 2 running, 10 missing; left to do, without decoding: about 4 min`."""
    counts = Counter(view.state for view in overview.cells)
    states = ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state])
    return f"{states}; left to do, without decoding: about {_format_duration(overview.seconds_left)}"


def render_summary(overview: Overview) -> Iterator[str]:
    """Reference models, what is done and left, what collapses and what else should be known."""
    for view in overview.artifacts:
        yield f"{view.role} {view.name}: {view.state}, about {_format_duration(view.estimated_seconds)}"
    done = sum(view.state == "done" for view in overview.cells)
    sizes = ", ".join(
        f"{_format_count(times, 'pack')} of {size}" for size, times in Counter(overview.pack_sizes).items()
    )
    yield f"{_format_count(len(overview.cells), 'cell')}, {done} done; {sizes}"
    yield f"left to do, without decoding: about {_format_duration(overview.seconds_left)}"
    yield from _render_estimate_bases(overview)
    yield from overview.collapsed_notes
    yield from overview.notes


def _render_estimate_bases(overview: Overview) -> Iterator[str]:
    """What the estimates of a cell's time rest on."""
    counts = Counter(view.estimate_basis for view in overview.cells)
    if counts["finished cells"]:
        yield f"time of {_format_count(counts['finished cells'], 'cell')}: as {overview.estimate_source} took"
    if counts["FLOPs"]:
        rate = f"{NOMINAL_FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s, two CPU cores on nano models"
        yield f"time of {_format_count(counts['FLOPs'], 'cell')}: of one alone, from its FLOPs at {rate}"
    if counts["nothing"]:
        why = "the size of a model is not known before it is here"
        yield f"time of {_format_count(counts['nothing'], 'cell')}: unknown, {why}"


def align_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns two spaces apart, as wide as their widest entry; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<" if name in _LEFT_ALIGNED_COLUMNS else ">" for name in header]
    for n, row in enumerate((header, *rows)):
        cells = (f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=True))
        line = "  ".join(cells).rstrip()
        yield line if n else _add_colour(line, "1")


def wrap_last_column(rows: Sequence[Sequence[str]]) -> list[list[str]]:
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


def _add_colour(line: str, code: str) -> str:
    if not code or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return line
    return f"\033[{code}m{line}\033[0m"


def _format_count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
