"""Report progress: a live bar on a terminal, lines in a file or pipe, with the time left; silence libraries.

A file or pipe gets a line at the start of a phase, at each quarter, and at its end.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gkd_lab.store.live_progress import WorkUnit, log_live_progress

ProgressUpdate = Callable[[int], None]
"""Callback that receives the amount done so far, not an increment."""


def format_duration(seconds: float) -> str:
    """Return seconds, rounded, as text: `1:02:03`, or below an hour `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Reporter:
    """Writer of messages and progress to standard error; standard output is for a command's result."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Print one line to standard error, neither wrapped nor read as markup."""
        self.console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def phase(
        self,
        name: str,
        total: int,
        done: int = 0,
        *,
        folders: Sequence[Path] = (),
        work: str = "",
        unit: WorkUnit = "rows",
    ) -> Iterator[ProgressUpdate]:
        """Show progress in the block; yield a function to call with the units done so far, not an increment.

        total: units of work. done: those done before this phase, which count as done so far. folders: Records
        in which the progress stands too while the block lasts, as so many units of `work`, for `status`.
        """
        show = self._show_bar if self.console.is_terminal else self._print_progress_lines
        with (
            show(name, total, done) as show_count,
            log_live_progress(folders, work, unit, total, done) as log,
        ):

            def update(count: int) -> None:
                """Show and log the units done so far."""
                show_count(count)
                log(count)

            yield update

    @contextmanager
    def _show_bar(self, name: str, total: int, done: int) -> Iterator[ProgressUpdate]:
        """Show a live bar with elapsed and remaining time; yield a function that sets the units done."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total, completed=done)
            yield lambda count: progress.update(task, completed=count)

    @contextmanager
    def _print_progress_lines(self, name: str, total: int, done: int) -> Iterator[ProgressUpdate]:
        """Print a line at start, each quarter and end; yield a function that sets the units done so far."""
        start, quarter = time.monotonic(), done * 4 // max(total, 1)
        self.say(f"{name}: {done} of {total}")

        def update(count: int) -> None:
            """Print a line with the time left if `count`, the units done so far, is in a new quarter."""
            nonlocal quarter
            if count * 4 // total > quarter and count < total:
                quarter = count * 4 // total
                elapsed = time.monotonic() - start
                remaining = elapsed / max(count - done, 1) * (total - count)
                self.say(f"{name}: {count} of {total}, {format_duration(remaining)} left")

        yield update
        self.say(f"{name}: done in {format_duration(time.monotonic() - start)}")


def silence_libraries() -> None:
    """Show only errors of transformers, datasets, accelerate and trl: no progress bars, no FutureWarning."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\..*")
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("transformers", "datasets", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
