"""Tables in a terminal, by rich, and `status --watch`."""

import time
from collections.abc import Callable, Generator
from itertools import zip_longest

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gkd_lab.config import Grid
from gkd_lab.status.overview import Overview, build_overview
from gkd_lab.status.render import (
    TEXT_COLUMNS,
    Listing,
    list_cells,
    render_running_artifacts,
    render_state_counts,
)
from gkd_lab.store import Store

OverviewDisplay = Generator[None, Overview, None]

REFRESH_SECONDS = 2.0
_UNFOLDED_COLUMNS = {"cell", "lmbda", "beta", "seed", "status", "step", "loss", "left", "experiment", "pack"}
_MIN_FOLDED_WIDTH = 5
"""Characters of a column that is folded where a terminal is too narrow for the table."""


def print_table(listing: Listing, console: Console | None = None) -> None:
    """Print a table by rich, coloured and folded to the console's width."""
    console = console or Console()
    console.print(build_rich_table(listing, console.width), crop=False)


def build_rich_table(listing: Listing, terminal_width: int, *, fold: bool = True) -> Table:
    """Build the rich table without empty columns; `fold`: long columns may wrap if too wide."""
    indices = [n for n in range(len(listing.columns)) if any(row[n] for row in listing.rows)]
    widths = [max(len(row[n]) for row in (listing.columns, *listing.rows)) for n in indices]
    gap = 2 if sum(widths) + 2 * len(indices) <= terminal_width else 1
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for n, width in zip(indices, widths, strict=True):
        name = listing.columns[n]
        is_folded = fold and name not in _UNFOLDED_COLUMNS
        table.add_column(
            name,
            justify="left" if name in TEXT_COLUMNS else "right",
            overflow="fold",
            min_width=min(width, _MIN_FOLDED_WIDTH) if is_folded else width,
        )
    for row, style in zip_longest(listing.rows, listing.styles, fillvalue=""):
        table.add_row(*(Text(row[n]) for n in indices), style=style)
    return table


def watch_grid(
    grid: Grid,
    store: Store,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Overview:
    """Show the grid until all its cells are done or failed, or until Ctrl-C; return the last overview.

    A terminal is redrawn; a file or a pipe gets a line whenever the counts of states change.
    """
    console = console or Console()
    overview = build_overview(grid, store, "auto")
    display = (_redraw_terminal if console.is_terminal else _print_state_changes)(grid, console)
    next(display)
    try:
        display.send(overview)
        while not overview.is_settled:
            sleep(REFRESH_SECONDS)
            overview = build_overview(grid, store, "auto")
            display.send(overview)
    except KeyboardInterrupt:
        pass
    finally:
        display.close()
    return overview


def _redraw_terminal(grid: Grid, console: Console) -> OverviewDisplay:
    """Redraw the table in place for each overview sent to this generator; erase it when closed."""
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            live.update(_build_screen(grid, (yield), console), refresh=True)


def _build_screen(grid: Grid, overview: Overview, console: Console) -> Group:
    """Build table, artifacts and footer; only running or failed cells if not all fit the terminal."""
    artifacts = [Text(line) for line in render_running_artifacts(overview)]
    max_rows = console.height - 3 - len(artifacts)
    listing = list_cells(grid, overview, show_progress=True)
    if len(listing.rows) > max_rows:
        listing = list_cells(grid, overview, show_progress=True, states=("running", "failed"))
        listing = Listing(listing.columns, listing.rows[:max_rows], listing.styles[:max_rows])
    footer = Text(f"{render_state_counts(overview)}; Ctrl-C leaves, the work goes on")
    return Group(build_rich_table(listing, console.width, fold=False), *artifacts, footer)


def _print_state_changes(grid: Grid, console: Console) -> OverviewDisplay:
    """Print a line of state counts for an overview sent to this generator if a state changed."""
    previous_states = None
    while True:
        overview = yield
        states = [view.state for view in overview.cells]
        if states != previous_states:
            previous_states = states
            line = f"{grid.name}: {render_state_counts(overview)}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)
