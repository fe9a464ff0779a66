"""`status --watch` looks again until every cell is done or failed, or until Ctrl-C."""

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gkd_lab.config import Grid
from gkd_lab.status.overview import Overview
from gkd_lab.status.watch import watch_grid
from gkd_lab.store import Store

from ..tables.synthetic_store import build_grid, fill_store


def watched(
    grid: Grid, store: Store, *, terminal: bool, wait: Callable[[float], None]
) -> tuple[Overview, str]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, height=12)
    return watch_grid(grid, store, console, wait), text.getvalue()


def finishing(grid: Grid, store: Store) -> Callable[[float], None]:
    """In the time between two looks one more cell is finished; the last one fails."""
    left = list(grid.cells)

    def wait(seconds: float) -> None:
        assert seconds > 0
        cell = left.pop(0)
        if left:
            fill_store(grid, store, cells=[cell])
        else:
            store.get_record(cell).mark_failed("ValueError: no luck")

    return wait


def test_a_pipe_gets_a_line_at_each_change_until_all_is_settled(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"seed": [0, 1, 2]}), Store(tmp_path)
    found, text = watched(grid, store, terminal=False, wait=finishing(grid, store))
    assert found.is_settled
    assert [line.split(";")[0] for line in text.splitlines()] == [
        "made: 3 missing",
        "made: 1 done, 2 missing",
        "made: 2 done, 1 missing",
        "made: 2 done, 1 failed",
    ]


def test_a_terminal_shows_all_cells_or_those_that_matter_and_is_left_clean(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"seed": [0, 1]}), Store(tmp_path)
    _, text = watched(grid, store, terminal=True, wait=finishing(grid, store))
    assert all(cell.fingerprint in text for cell in grid.cells)
    many = build_grid(grid={"seed": list(range(100, 130))})
    store.get_record(many.cells[0]).mark_failed("ValueError: no luck")

    def leave(seconds: float) -> None:
        raise KeyboardInterrupt

    _, text = watched(many, store, terminal=True, wait=leave)
    assert many.cells[0].fingerprint in text
    assert many.cells[1].fingerprint not in text


def test_ctrl_c_leaves_with_what_was_seen(tmp_path: Path) -> None:
    grid, store = build_grid(), Store(tmp_path)

    def leave(seconds: float) -> None:
        raise KeyboardInterrupt

    found, text = watched(grid, store, terminal=False, wait=leave)
    assert not found.is_settled
    assert text.startswith("made: 9 missing")
