"""`status --watch` refreshes until every cell is done or failed, or until Ctrl-C."""

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gkd_lab.config import Grid
from gkd_lab.status.overview import Overview
from gkd_lab.status.terminal import watch_grid
from gkd_lab.store import Store

from ..tables.synthetic_store import build_grid, fill_store


def watch_in_console(
    grid: Grid, store: Store, *, is_terminal: bool, sleep: Callable[[float], None]
) -> tuple[Overview, str]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=is_terminal, width=120, height=12)
    return watch_grid(grid, store, console, sleep), text.getvalue()


def finish_one_cell_at_a_time(grid: Grid, store: Store) -> Callable[[float], None]:
    """Return a `sleep` that finishes one more cell at each call; the last one fails."""
    remaining = list(grid.cells)

    def sleep(seconds: float) -> None:
        assert seconds > 0
        cell = remaining.pop(0)
        if remaining:
            fill_store(grid, store, cells=[cell])
        else:
            store.get_record(cell).mark_failed("ValueError: no luck")

    return sleep


def test_a_pipe_gets_a_line_for_each_change_of_states(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"seed": [0, 1, 2]}), Store(tmp_path)
    overview, text = watch_in_console(
        grid, store, is_terminal=False, sleep=finish_one_cell_at_a_time(grid, store)
    )
    assert overview.is_settled
    assert [line.split(";")[0] for line in text.splitlines()] == [
        "made: 3 missing",
        "made: 1 done, 2 missing",
        "made: 2 done, 1 missing",
        "made: 2 done, 1 failed",
    ]


def test_a_terminal_shows_all_cells_or_only_running_and_failed_ones(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"seed": [0, 1]}), Store(tmp_path)
    _, text = watch_in_console(grid, store, is_terminal=True, sleep=finish_one_cell_at_a_time(grid, store))
    assert all(cell.fingerprint in text for cell in grid.cells)
    many = build_grid(grid={"seed": list(range(100, 130))})
    store.get_record(many.cells[0]).mark_failed("ValueError: no luck")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    _, text = watch_in_console(many, store, is_terminal=True, sleep=interrupt)
    assert many.cells[0].fingerprint in text
    assert many.cells[1].fingerprint not in text


def test_ctrl_c_returns_the_last_overview(tmp_path: Path) -> None:
    grid, store = build_grid(), Store(tmp_path)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    overview, text = watch_in_console(grid, store, is_terminal=False, sleep=interrupt)
    assert not overview.is_settled
    assert text.startswith("made: 9 missing")
