"""Claims on cells, so that any number of processes on any number of machines share an outputs folder."""

from collections.abc import Sequence
from contextlib import ExitStack

from filelock import Timeout

from gkd_lab.config.cell import Cell
from gkd_lab.runner.run_options import RunOptions

LOCK_TIMEOUT = 0.2
"""Seconds, not 0: a reader that asks whether a cell is claimed holds the lock for an instant."""


class PackLock:
    """The cells of a pack that this process may work on, locked for as long as the block lasts.

    They are claimed in sorted order, all or those it gets: of two processes that meet at a pack, the second
    waits for the first cell while the first claims the others.
    """

    def __init__(self, cells: Sequence[Cell], options: RunOptions) -> None:
        self.requested_cells, self.options = cells, options
        self.locked_cells: list[Cell] = []
        self.busy_cells: list[Cell] = []
        self._stack = ExitStack()

    def __enter__(self) -> "PackLock":
        with self._stack as stack:
            for cell in sorted(self.requested_cells, key=lambda cell: cell.folder):
                self._try_lock_cell(cell, stack)
            self._stack = stack.pop_all()
        others = {cell.full_fingerprint for cell in self.busy_cells}
        self.locked_cells = [cell for cell in self.requested_cells if cell.full_fingerprint not in others]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _try_lock_cell(self, cell: Cell, stack: ExitStack) -> None:
        patience = 0.02 if self.busy_cells else LOCK_TIMEOUT
        lock = self.options.store.get_record(cell).lock()
        try:
            stack.enter_context(lock.acquire(timeout=patience, poll_interval=0.02))
        except Timeout:
            self.busy_cells.append(cell)
