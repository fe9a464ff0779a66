"""Lock the cells of a pack, so that any number of processes and machines share an outputs folder.

The lock of one folder is `gkd_lab.store.lock.FolderLock`.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from filelock import Timeout

from gkd_lab.config.cell import Cell
from gkd_lab.runner.run_options import RunOptions

LOCK_TIMEOUT = 0.2
"""Seconds to wait for a cell's lock; not 0, because `is_locked` holds the lock for an instant."""
_POLL_INTERVAL = 0.02


class PackLock:
    """Context manager that locks those cells of a pack that no other process has locked.

    Cells are locked in sorted order. Of two processes that meet at a pack, the second waits for the first
    cell while the first process locks the others.
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
        busy = {cell.full_fingerprint for cell in self.busy_cells}
        self.locked_cells = [cell for cell in self.requested_cells if cell.full_fingerprint not in busy]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _try_lock_cell(self, cell: Cell, stack: ExitStack) -> None:
        """Lock a cell until the stack closes, or if another process has it, add it to `busy_cells`."""
        timeout = _POLL_INTERVAL if self.busy_cells else LOCK_TIMEOUT
        lock = self.options.store.get_record(cell).lock()
        try:
            stack.enter_context(lock.acquire(timeout=timeout, poll_interval=_POLL_INTERVAL))
        except Timeout:
            self.busy_cells.append(cell)
