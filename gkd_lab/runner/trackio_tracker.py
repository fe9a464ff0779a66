"""Runs at trackio, which stores them in a local folder or on its own server and has wandb's interface."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from functools import partial
from typing import Any

from gkd_lab.config import Cell, ConfigError
from gkd_lab.config.sweep import WANDB_PROJECT


class TrackioClient:
    """Client that opens runs. Raises ConfigError where trackio is not installed."""

    def __init__(self, experiment: str) -> None:
        self.experiment, self._trackio = experiment, _import_trackio()

    def open_run(self, cell: Cell, config: dict[str, Any]) -> "TrackioRun":
        """Open a run named after the cell's folder, or resume the run of that name; other runs stay open."""
        begin = partial(
            self._trackio.init,
            project=WANDB_PROJECT,
            name=cell.folder.partition("/")[2],
            group=self.experiment,
            config=config,
            resume="allow",
            embed=False,
        )
        # In a context of its own, because `init` finishes the open run of the current context.
        with _discard_stdout():
            return TrackioRun(copy_context().run(begin))


class TrackioRun:
    """Open run. Because trackio has no summary, status and `exit_code` are a last row."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.next_step = 0
        self.logged_scores: set[str] = set()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send a row of values at a step."""
        self._run.log(dict(row), step=step)

    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None:
        """Send summary and exit code as a last row, and finish the run; `interrupted` has no effect."""
        self._run.log({**summary, "exit_code": exit_code}, step=self.next_step)
        with _discard_stdout():
            self._run.finish()


def _import_trackio() -> Any:
    """Import and return the module trackio. Raises ConfigError where it is not installed."""
    try:
        import trackio
    except ImportError as error:
        raise ConfigError(
            "--tracker trackio: trackio is not installed; add it with `pip install gkd-lab[trackio]`"
        ) from error
    return trackio


@contextlib.contextmanager
def _discard_stdout() -> Iterator[None]:
    """Discard all standard output of the block: what trackio prints is no result of a command."""
    with open(os.devnull, "w") as null_file, contextlib.redirect_stdout(null_file):
        yield
