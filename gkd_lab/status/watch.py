"""`status --watch`: the listing again every few seconds, until every cell is done or failed, or Ctrl-C."""

import time
from collections.abc import Callable, Generator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gkd_lab.config import Grid
from gkd_lab.status.overview import Overview, build_overview
from gkd_lab.status.render import render_cells, render_running_artifacts, render_state_counts
from gkd_lab.store import Store

OverviewDisplay = Generator[None, Overview, None]

REFRESH_SECONDS = 2.0
"""Seconds between two looks."""


def watch_grid(
    grid: Grid,
    store: Store,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Overview:
    """Show the grid until all of it is settled or Ctrl-C; returns the last that was seen.

    A terminal is redrawn; a file or a pipe gets a line whenever the counts of states change.
    """
    console = console or Console()
    found = build_overview(grid, store, "auto")
    show = _redraw_terminal if console.is_terminal else _print_state_changes
    drawing = show(grid, console)
    next(drawing)
    try:
        drawing.send(found)
        while not found.is_settled:
            sleep(REFRESH_SECONDS)
            found = build_overview(grid, store, "auto")
            drawing.send(found)
    except KeyboardInterrupt:
        pass
    finally:
        drawing.close()
    return found


def _redraw_terminal(grid: Grid, console: Console) -> OverviewDisplay:
    # Gone at the end: the whole listing takes its place.
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            live.update(_build_screen(grid, (yield), console), refresh=True)


def _build_screen(grid: Grid, overview: Overview, console: Console) -> Group:
    """As much as fits: all cells, or those that are worked on or failed."""
    built = list(render_running_artifacts(overview))
    lines, room = list(render_cells(grid, overview, show_progress=True)), console.height - 2 - len(built)
    if len(lines) > room:
        lines = list(render_cells(grid, overview, show_progress=True, only=("running", "failed")))[:room]
    text = [Text.from_ansi(line, no_wrap=True, overflow="ellipsis") for line in (*lines, *built)]
    return Group(*text, Text(f"{render_state_counts(overview)}; Ctrl-C leaves, the work goes on"))


def _print_state_changes(grid: Grid, console: Console) -> OverviewDisplay:
    said = None
    while True:
        found = yield
        counts = [view.state for view in found.cells]
        if counts != said:
            said = counts
            console.print(
                f"{grid.name}: {render_state_counts(found)}", soft_wrap=True, markup=False, highlight=False
            )
