"""Run a tiny experiment in children that kill themselves at given moments, and then to its end.

    python killed_script.py TINY_EXPERIMENTS_FILE TASK FOLDER CHANGES

CHANGES is JSON: fields of the experiment to replace.

Children are forked from this clean process, so that the libraries are loaded once. A moment is a rename, by
which each file of a record appears, or a step of a phase. Writes FOLDER/moments.json: moment -> folder.
"""

import gc
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

from gkd_lab.runner.progress import ProgressUpdate, Reporter, silence_libraries
from gkd_lab.runner.run import run_grid


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DeadlyReporter(Reporter):
    """Reporter that kills the process when the phase whose name contains `phase` has done `count`."""

    def __init__(self, phase: str, count: int) -> None:
        super().__init__(Console(quiet=True))
        self.phase_name, self.count = phase, count

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0, **places: Any) -> Iterator[ProgressUpdate]:
        def update(count: int) -> None:
            if self.phase_name in name and count >= self.count:
                kill_self()

        yield update


def die_at_rename(number: int) -> None:
    """Kill this process before its rename with this number."""
    rename_count = 0

    def hook(event: str, _: Any) -> None:
        nonlocal rename_count
        if event == "os.rename":
            rename_count += 1
            if rename_count == number:
                kill_self()

    sys.addaudithook(hook)


def die_at_export_of_sft_student() -> None:
    """Kill this process when the SFT student has all its steps, before its model gets its name."""

    def hook(event: str, paths: Any) -> None:
        if event == "os.rename" and "/start-" in str(paths[1]) and str(paths[1]).endswith("/checkpoint"):
            kill_self()

    sys.addaudithook(hook)


def count_renames(count_file: Path) -> None:
    rename_count = 0

    def hook(event: str, _: Any) -> None:
        nonlocal rename_count
        rename_count += event == "os.rename"

    sys.addaudithook(hook)
    import atexit

    atexit.register(lambda: count_file.write_text(str(rename_count)))


def run_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return its exit status, negative for a signal."""
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
    module_spec = importlib.util.spec_from_file_location("making", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    tiny_experiments = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(tiny_experiments)
    silence_libraries()
    gc.freeze()
    grid = tiny_experiments.tiny_grid(root, task, **json.loads(sys.argv[4]))
    evaluated = "1 cell" if grid.cells[0].training.lora else f"{len(grid.cells)} cells"

    def run_whole(outputs: Path, **changes: Any) -> None:
        outcome = run_grid(grid, tiny_experiments.options(outputs, **changes))
        assert not outcome.failures, outcome.failures

    def run_and_count() -> None:
        count_renames(root / "renames")
        run_whole(root / "undisturbed")

    assert run_child(run_and_count) == 0
    renames = int((root / "renames").read_text())
    moments: dict[str, Callable[[Path], None]] = {
        "teacher": lambda outputs: run_whole(outputs, reporter=DeadlyReporter(": teacher ", 3)),
        "distillation": lambda outputs: run_whole(outputs, reporter=DeadlyReporter("distillation", 3)),
        "evaluation": lambda outputs: run_whole(outputs, reporter=DeadlyReporter(f"{evaluated}, sample", 1)),
    }

    def run_until_export(outputs: Path) -> None:
        die_at_export_of_sft_student()
        run_whole(outputs)

    moments["export of the SFT student"] = run_until_export
    for eighth in (1, 3, 5, 7):
        number = renames * eighth // 8

        def run_until_rename(outputs: Path, number: int = number) -> None:
            die_at_rename(number)
            run_whole(outputs)

        moments[f"rename {number} of {renames}"] = run_until_rename
    folders = {}
    for name, work in moments.items():
        outputs = root / name.replace(" ", "-")
        assert run_child(lambda work=work, outputs=outputs: work(outputs)) == -signal.SIGKILL, name  # type: ignore[misc]
        assert run_child(lambda outputs=outputs: run_whole(outputs)) == 0, name  # type: ignore[misc]
        folders[name] = str(outputs)
    (root / "moments.json").write_text(json.dumps(folders))


if __name__ == "__main__":
    main()
