"""Runs at trackio, which keeps them in a local folder or on a server of its own and has wandb's verbs."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from functools import partial
from typing import Any

from gkd_lab.config import Cell, ConfigError
from gkd_lab.config.sweep import WANDB_PROJECT


class TrackioClient:
    """Opens runs. Raises SpecError where trackio is not installed."""

    def __init__(self, experiment: str) -> None:
        self.experiment, self._trackio = experiment, _import_trackio()

    def open_run(self, cell: Cell, config: dict[str, Any]) -> "TrackioRun":
        """The run of a cell; one of that name is gone on with."""
        begin = partial(
            self._trackio.init,
            project=WANDB_PROJECT,
            name=cell.folder.partition("/")[2],
            group=self.experiment,
            config=config,
            resume="allow",
            embed=False,
        )
        # In a context of its own, since `init` ends the run that it finds open in the current one.
        with _discard_stdout():
            return TrackioRun(copy_context().run(begin))


class TrackioRun:
    """An open run. trackio has no summary: the verdict is a last row, where `exit_code` is a value."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.next_step = 0
        self.logged_scores: set[str] = set()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """A row of the history."""
        self._run.log(dict(row), step=step)

    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None:
        """A last row with the verdict, and everything written."""
        self._run.log({**summary, "exit_code": exit_code}, step=self.next_step)
        with _discard_stdout():
            self._run.finish()


def _import_trackio() -> Any:
    try:
        import trackio
    except ImportError as error:
        raise ConfigError(
            "--tracker trackio: trackio is not installed; add it with `pip install gkd-lab[trackio]`"
        ) from error
    return trackio


@contextlib.contextmanager
def _discard_stdout() -> Iterator[None]:
    """What it prints goes nowhere: standard output is a command's result."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
