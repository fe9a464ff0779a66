"""Runs a tiny experiment in children that kill themselves at given moments, then to the end.

    python killed.py MAKING_FILE TASK FOLDER

Children are forked from this clean process, so that the libraries are loaded once. A moment is a rename
(each file of a record appears by one) or a step of a phase. Writes FOLDER/moments.json: moment -> folder.
"""

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.progress import ProgressUpdate, Reporter
from gkd_lab.runner.run import run_grid


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DeadlyReporter(Reporter):
    """Dies when the phase whose name contains `phase` has done `count`."""

    def __init__(self, phase: str, count: int) -> None:
        super().__init__(Console(quiet=True))
        self.phase_name, self.count = phase, count

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[ProgressUpdate]:
        def advance(count: int) -> None:
            if self.phase_name in name and count >= self.count:
                die()

        yield advance


def die_at_rename(number: int) -> None:
    """Before the rename with this number, counted in this process."""
    seen = 0

    def hook(event: str, _: Any) -> None:
        nonlocal seen
        if event == "os.rename":
            seen += 1
            if seen == number:
                die()

    sys.addaudithook(hook)


def count_renames(place: Path) -> None:
    seen = 0

    def hook(event: str, _: Any) -> None:
        nonlocal seen
        seen += event == "os.rename"

    sys.addaudithook(hook)
    import atexit

    atexit.register(lambda: place.write_text(str(seen)))


def child(work: Callable[[], None]) -> int:
    """Exit status of `work` in a process of its own; negative: the signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        import atexit

        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    file, task, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    found = importlib.util.spec_from_file_location("making", file)
    assert found is not None
    assert found.loader is not None
    making = importlib.util.module_from_spec(found)
    found.loader.exec_module(making)
    silence_libraries()
    grid = making.tiny_grid(root, task)

    def whole(outputs: Path, **more: Any) -> None:
        outcome = run_grid(grid, making.options(outputs, **more))
        assert not outcome.failures, outcome.failures

    def counted() -> None:
        count_renames(root / "renames")
        whole(root / "undisturbed")

    assert child(counted) == 0
    renames = int((root / "renames").read_text())
    moments: dict[str, Callable[[Path], None]] = {
        "teacher": lambda outputs: whole(outputs, reporter=DeadlyReporter(": teacher ", 3)),
        "distillation": lambda outputs: whole(outputs, reporter=DeadlyReporter("distillation", 3)),
        "evaluation": lambda outputs: whole(outputs, reporter=DeadlyReporter("6 cells, sample", 1)),
    }
    for eighth in (1, 3, 5, 7):
        number = renames * eighth // 8

        def at_rename(outputs: Path, number: int = number) -> None:
            die_at_rename(number)
            whole(outputs)

        moments[f"rename {number} of {renames}"] = at_rename
    places = {}
    for name, work in moments.items():
        outputs = root / name.replace(" ", "-")
        assert child(lambda work=work, outputs=outputs: work(outputs)) == -signal.SIGKILL, name  # type: ignore[misc]
        assert child(lambda outputs=outputs: whole(outputs)) == 0, name  # type: ignore[misc]
        places[name] = str(outputs)
    (root / "moments.json").write_text(json.dumps(places))


if __name__ == "__main__":
    main()
