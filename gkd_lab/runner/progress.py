"""What a person sees of long work: one line a phase, with the time left.

A terminal gets a live bar; a file or a pipe gets a line when a phase starts, at each quarter, and at its end.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ProgressUpdate = Callable[[int], None]
"""Called with how much has been done in all."""


def format_duration(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Reporter:
    """Writes to standard error, so that standard output stays a command's result."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[ProgressUpdate]:
        """Work of `total` units of which `done` were done before."""
        show = self._show_bar if self.console.is_terminal else self._print_progress_lines
        with show(name, total, done) as advance:
            yield advance

    @contextmanager
    def _show_bar(self, name: str, total: int, done: int) -> Iterator[ProgressUpdate]:
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
        start, reached = time.monotonic(), done * 4 // max(total, 1)
        self.say(f"{name}: {done} of {total}")

        def advance(count: int) -> None:
            nonlocal reached
            if count * 4 // total > reached and count < total:
                reached = count * 4 // total
                passed = time.monotonic() - start
                left = passed / max(count - done, 1) * (total - count)
                self.say(f"{name}: {count} of {total}, {format_duration(left)} left")

        yield advance
        self.say(f"{name}: done in {format_duration(time.monotonic() - start)}")
