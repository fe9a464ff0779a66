"""Claims on cells: a lock for each, so that any number of processes share an outputs folder."""

from collections.abc import Sequence
from contextlib import ExitStack

from filelock import Timeout

from gkd_lab.runs.artifacts import waited_for
from gkd_lab.runs.options import RunOptions
from gkd_lab.spec.cell import Cell


class Claimed:
    """The cells of a pack that this process may work on, locked for as long as the block lasts."""

    def __init__(self, cells: Sequence[Cell], options: RunOptions) -> None:
        self.wanted, self.options = cells, options
        self.cells: list[Cell] = []
        self.elsewhere: list[Cell] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Claimed":
        for cell in sorted(self.wanted, key=lambda cell: cell.folder):
            try:
                self._claim(cell)
            except Timeout:
                self.elsewhere.append(cell)
        others = {cell.full_fingerprint for cell in self.elsewhere}
        self.cells = [cell for cell in self.wanted if cell.full_fingerprint not in others]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _claim(self, cell: Cell) -> None:
        """Lock a cell; one that another process holds is waited for where that is asked. Raises Timeout."""
        record = self.options.store.of(cell)
        if self.options.held == "wait":
            self._stack.enter_context(waited_for(record, f"cell {cell.fingerprint}", self.options))
        else:
            # Not 0: a reader that asks whether a cell is claimed holds the lock for an instant.
            self._stack.enter_context(record.lock().acquire(timeout=0.2, poll_interval=0.02))
