"""`status --watch`: the listing again every few seconds, until every cell is done or failed, or Ctrl-C."""

import time
from collections.abc import Callable, Generator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gkd_lab.config import GridOfCells
from gkd_lab.status.overview import Overview, overview
from gkd_lab.status.render import cell_lines, reference_lines, standing_line
from gkd_lab.store import Store

Drawing = Generator[None, Overview, None]

EVERY = 2.0
"""Seconds between two looks."""


def watch(
    grid: GridOfCells,
    store: Store,
    console: Console | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Overview:
    """Show the grid until all of it is settled or Ctrl-C; returns the last that was seen.

    A terminal is redrawn; a file or a pipe gets a line whenever the counts of states change.
    """
    console = console or Console()
    found = overview(grid, store, "auto")
    show = _redrawn if console.is_terminal else _lines
    drawing = show(grid, console)
    next(drawing)
    try:
        drawing.send(found)
        while not found.settled:
            wait(EVERY)
            found = overview(grid, store, "auto")
            drawing.send(found)
    except KeyboardInterrupt:
        pass
    finally:
        drawing.close()
    return found


def _redrawn(grid: GridOfCells, console: Console) -> Drawing:
    # Gone at the end: the whole listing takes its place.
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            live.update(_screen(grid, (yield), console), refresh=True)


def _screen(grid: GridOfCells, found: Overview, console: Console) -> Group:
    """As much as fits: all cells, or those that are worked on or failed."""
    built = list(reference_lines(found))
    lines, room = list(cell_lines(grid, found, progress=True)), console.height - 2 - len(built)
    if len(lines) > room:
        lines = list(cell_lines(grid, found, progress=True, only=("running", "failed")))[:room]
    text = [Text.from_ansi(line, no_wrap=True, overflow="ellipsis") for line in (*lines, *built)]
    return Group(*text, Text(f"{standing_line(found)}; Ctrl-C leaves, the work goes on"))


def _lines(grid: GridOfCells, console: Console) -> Drawing:
    said = None
    while True:
        found = yield
        counts = [view.state for view in found.cells]
        if counts != said:
            said = counts
            console.print(
                f"{grid.name}: {standing_line(found)}", soft_wrap=True, markup=False, highlight=False
            )
