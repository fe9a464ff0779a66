"""Runs a tiny experiment that meets a fault, and again without it, in children of one clean process.

    python faults.py MAKING_FILE FOLDER

Writes FOLDER/found.json: fault -> {"status": what the first child ended with, "left": what it left behind,
"again": how the second ended, "said": what it told}. Records are in FOLDER/<fault>.
"""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gkd_lab.runner import interrupts
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.progress import ProgressUpdate, Reporter
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Record, Store, lock

SMALL = {"grid": {"lmbda": [0.5, 1]}, "evaluations": [{"decoding": "greedy"}]}
Work = Callable[[Path], None]


class Acting(Reporter):
    """Does something when the phase whose name contains `name` has done `count`."""

    def __init__(self, name: str, count: int, act: Callable[[], Any]) -> None:
        super().__init__(Console(quiet=True))
        self.name, self.count, self.act = name, count, act

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[ProgressUpdate]:
        def advance(count: int) -> None:
            if self.name in name and count == self.count:
                self.act()

        if self.name in name and self.count == 0:
            self.act()
        yield advance


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def die_at_open(words: tuple[str, ...]) -> None:
    """Killed when a file whose path has all these words is opened to be written."""

    def hook(event: str, found: Any) -> None:
        if event == "open" and isinstance(found[0], str) and all(word in found[0] for word in words):
            mode, flags = found[1], found[2] or 0
            if (mode and set(mode) & set("wxa+")) or flags & (os.O_WRONLY | os.O_RDWR):
                send(signal.SIGKILL)

    sys.addaudithook(hook)


def child(work: Callable[[], None], log: Path) -> int:
    """The process id of `work` in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    status = 1
    try:
        torch.set_num_threads(1)
        with interrupts.handle_signals():
            work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as stop:
        status = int(stop.code or 0)
    except OSError as error:
        print(f"OSError {error.errno}: {error}", file=sys.stderr)
        status = 3
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def ended(*pids: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def flip(path: Path, at: int = -3) -> None:
    """One bit of one byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def left_behind(outputs: Path) -> list[str]:
    return sorted(str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file())


def main() -> None:
    file, root = sys.argv[1], Path(sys.argv[2])
    source = importlib.util.spec_from_file_location("making", file)
    assert source is not None
    assert source.loader is not None
    making = importlib.util.module_from_spec(source)
    source.loader.exec_module(making)
    silence_libraries()
    grid = making.tiny_grid(root, "arithmetic", **SMALL)

    def whole(outputs: Path, **more: Any) -> None:
        outcome = run_grid(grid, making.options(outputs, busy_cells="wait", **more))
        assert not outcome.failures, outcome.failures

    def acting(name: str, count: int, act: Callable[[], Any]) -> Work:
        return lambda outputs: whole(outputs, reporter=Acting(name, count, act))

    def dying(*words: str) -> Work:
        def work(outputs: Path) -> None:
            die_at_open(words)
            whole(outputs)

        return work

    def a_cell(outputs: Path) -> Record:
        return Store(outputs).get_record(grid.cells[0])

    def taken_over(outputs: Path) -> None:
        """As if this process had been silent for long: a heartbeat that is another's lies in its place."""
        lock.BEAT_SECONDS = 0.05

        def act() -> None:
            other = a_cell(outputs).folder / "other"
            other.write_text(json.dumps({"host": "far", "machine": "far/1", "token": "t"}))
            other.replace(a_cell(outputs).folder / ".owner.json")
            time.sleep(0.5)

        whole(outputs, reporter=Acting("distillation", 2, act))

    def full(outputs: Path) -> None:
        outputs.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(outputs)], check=True)
        whole(outputs)

    def steps(outputs: Path, name: str = "checkpoint-3/model.safetensors") -> Path:
        return a_cell(outputs).steps_folder / name

    stop = acting("distillation", 3, partial(send, signal.SIGTERM))
    none: Work = lambda outputs: None  # noqa: E731
    faults: dict[str, tuple[Work, Work]] = {
        "undisturbed": (whole, none),
        "SIGTERM in SFT": (acting(": teacher ", 3, partial(send, signal.SIGTERM)), none),
        "SIGTERM in training": (stop, none),
        "Ctrl-C in training": (acting("distillation", 3, partial(send, signal.SIGINT)), none),
        "Ctrl-C twice": (acting("distillation", 3, partial(send, signal.SIGINT, signal.SIGINT)), none),
        "SIGTERM in evaluation": (acting("2 cells, greedy", 0, partial(send, signal.SIGTERM)), none),
        "SIGKILL in a checkpoint": (dying("lmbda=1", "checkpoint-4", "optimizer.json"), none),
        "SIGKILL in status.json": (dying("lmbda=1", ".status.json"), none),
        "taken over": (taken_over, lambda outputs: (a_cell(outputs).folder / ".owner.json").unlink()),
        "disk full": (full, none),
        "flipped checkpoint": (stop, lambda outputs: flip(steps(outputs))),
        "cut checkpoint": (stop, lambda outputs: cut(steps(outputs, "checkpoint-3/optimizer.safetensors"))),
        "cut metrics": (stop, lambda outputs: cut(a_cell(outputs).metrics_file)),
        "flipped spec": (stop, lambda outputs: flip(a_cell(outputs).folder / "spec.json", -40)),
        "flipped student": (
            stop,
            lambda outputs: flip(next(outputs.glob("nano/*/start-*")) / "checkpoint" / "model.safetensors"),
        ),
        "cut status": (whole, lambda outputs: cut(a_cell(outputs).status_file)),
    }
    found = {}
    for name, (work, then) in faults.items():
        outputs, log = root / name.replace(" ", "-"), root / f"{name.replace(' ', '-')}.log"
        (status,) = ended(child(lambda work=work, outputs=outputs: work(outputs), log))  # type: ignore[misc]
        left = left_behind(outputs)
        if name == "disk full" and os.path.ismount(outputs):
            subprocess.run(["mount", "-o", "remount,size=50m", str(outputs)], check=True)
        then(outputs)

        def again(outputs: Path = outputs, log: Path = log) -> None:
            told = io.StringIO()
            try:
                whole(outputs, reporter=Reporter(Console(file=told, width=500)))
            finally:
                log.with_suffix(".said").write_text(told.getvalue())

        (once_more,) = ended(child(again, log))
        said = log.with_suffix(".said").read_text()
        found[name] = {"status": status, "left": left, "again": once_more, "said": said}
    both = root / "twice-at-once"
    pids = [child(partial(whole, both), root / f"twice-{n}.log") for n in range(2)]
    found["twice at once"] = {"status": max(ended(*pids)), "left": [], "again": 0, "said": ""}
    (root / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
