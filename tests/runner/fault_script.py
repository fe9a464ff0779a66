"""Run a tiny experiment with each fault, and again without it, in children of one clean process.

    python fault_script.py TINY_EXPERIMENTS_FILE FOLDER

Writes FOLDER/found.json: fault -> {"status": exit status of the first child, "left": files that it left,
"again": exit status of the second child, "said": what that one printed}. Records are in FOLDER/<fault>.
"""

import gc
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
from gkd_lab.runner.progress import ProgressUpdate, Reporter, silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Record, Store, lock_owner

SMALL = {"grid": {"lmbda": [0.5, 1]}, "evaluations": [{"decoding": "greedy"}]}
Work = Callable[[Path], None]


class ActingReporter(Reporter):
    """Reporter that calls `act` when the phase whose name contains `name` has done `count`."""

    def __init__(self, name: str, count: int, act: Callable[[], Any]) -> None:
        super().__init__(Console(quiet=True))
        self.name, self.count, self.act = name, count, act

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0, **places: Any) -> Iterator[ProgressUpdate]:
        def update(count: int) -> None:
            if self.name in name and count == self.count:
                self.act()

        if self.name in name and self.count == 0:
            self.act()
        yield update


def send_signals(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def die_at_open(words: tuple[str, ...]) -> None:
    """Kill this process when a file whose path contains all these words is opened for writing."""

    def hook(event: str, outcomes: Any) -> None:
        if event == "open" and isinstance(outcomes[0], str) and all(word in outcomes[0] for word in words):
            mode, flags = outcomes[1], outcomes[2] or 0
            if (mode and set(mode) & set("wxa+")) or flags & (os.O_WRONLY | os.O_RDWR):
                send_signals(signal.SIGKILL)

    sys.addaudithook(hook)


def fork_child(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a forked child; return its process id."""
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


def wait_for(*pids: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def flip_bit(path: Path, at: int = -3) -> None:
    """Flip one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def list_files(outputs: Path) -> list[str]:
    return sorted(str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file())


def main() -> None:
    module_file, root = sys.argv[1], Path(sys.argv[2])
    module_spec = importlib.util.spec_from_file_location("making", module_file)
    assert module_spec is not None
    assert module_spec.loader is not None
    tiny_experiments = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(tiny_experiments)
    silence_libraries()
    gc.freeze()
    grid = tiny_experiments.tiny_grid(root, "arithmetic", **SMALL)

    def run_whole(outputs: Path, **changes: Any) -> None:
        outcome = run_grid(grid, tiny_experiments.options(outputs, busy_cells="wait", **changes))
        assert not outcome.failures, outcome.failures

    def act_in_phase(name: str, count: int, act: Callable[[], Any]) -> Work:
        return lambda outputs: run_whole(outputs, reporter=ActingReporter(name, count, act))

    def die_writing(*words: str) -> Work:
        def work(outputs: Path) -> None:
            die_at_open(words)
            run_whole(outputs)

        return work

    def get_first_record(outputs: Path) -> Record:
        return Store(outputs).get_record(grid.cells[0])

    def lose_lock(outputs: Path) -> None:
        """Replace the heartbeat as if this process had been silent and another had taken its lock."""
        lock_owner.BEAT_SECONDS = 0.05

        def act() -> None:
            remote_file = get_first_record(outputs).folder / "other"
            remote_file.write_text(json.dumps({"host": "far", "machine": "far/1", "token": "t"}))
            remote_file.replace(get_first_record(outputs).folder / ".owner.json")
            time.sleep(0.5)

        run_whole(outputs, reporter=ActingReporter("distillation", 2, act))

    def fill_disk(outputs: Path) -> None:
        outputs.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(outputs)], check=True)
        run_whole(outputs)

    def get_checkpoint_file(outputs: Path, name: str = "checkpoint-3/model.safetensors") -> Path:
        return get_first_record(outputs).steps_folder / name

    stop = act_in_phase("distillation", 3, partial(send_signals, signal.SIGTERM))
    do_nothing: Work = lambda outputs: None  # noqa: E731
    faults: dict[str, tuple[Work, Work]] = {
        "undisturbed": (run_whole, do_nothing),
        "SIGTERM in SFT": (act_in_phase(": teacher ", 3, partial(send_signals, signal.SIGTERM)), do_nothing),
        "SIGTERM in training": (stop, do_nothing),
        "Ctrl-C in training": (
            act_in_phase("distillation", 3, partial(send_signals, signal.SIGINT)),
            do_nothing,
        ),
        "Ctrl-C twice": (
            act_in_phase("distillation", 3, partial(send_signals, signal.SIGINT, signal.SIGINT)),
            do_nothing,
        ),
        "SIGTERM in evaluation": (
            act_in_phase("2 cells, greedy", 0, partial(send_signals, signal.SIGTERM)),
            do_nothing,
        ),
        "SIGKILL in a checkpoint": (die_writing("lmbda=1", "checkpoint-4", "optimizer.json"), do_nothing),
        "SIGKILL in status.json": (die_writing("lmbda=1", ".status.json"), do_nothing),
        "taken over": (
            lose_lock,
            lambda outputs: (get_first_record(outputs).folder / ".owner.json").unlink(),
        ),
        "disk full": (fill_disk, do_nothing),
        "flipped checkpoint": (stop, lambda outputs: flip_bit(get_checkpoint_file(outputs))),
        "cut checkpoint": (
            stop,
            lambda outputs: truncate(get_checkpoint_file(outputs, "checkpoint-3/optimizer.safetensors")),
        ),
        "cut metrics": (stop, lambda outputs: truncate(get_first_record(outputs).metrics_file)),
        "flipped spec": (stop, lambda outputs: flip_bit(get_first_record(outputs).folder / "spec.json", -40)),
        "flipped student": (
            stop,
            lambda outputs: flip_bit(
                next(outputs.glob("nano/*/start-*")) / "checkpoint" / "model.safetensors"
            ),
        ),
        "cut status": (run_whole, lambda outputs: truncate(get_first_record(outputs).status_file)),
    }
    outcomes = {}
    for name, (work, repair) in faults.items():
        outputs, log = root / name.replace(" ", "-"), root / f"{name.replace(' ', '-')}.log"
        (status,) = wait_for(fork_child(lambda work=work, outputs=outputs: work(outputs), log))  # type: ignore[misc]
        files_left = list_files(outputs)
        if name == "disk full" and os.path.ismount(outputs):
            subprocess.run(["mount", "-o", "remount,size=50m", str(outputs)], check=True)
        repair(outputs)

        def run_again(outputs: Path = outputs, log: Path = log) -> None:
            output = io.StringIO()
            try:
                run_whole(outputs, reporter=Reporter(Console(file=output, width=500)))
            finally:
                log.with_suffix(".said").write_text(output.getvalue())

        (second_status,) = wait_for(fork_child(run_again, log))
        text = log.with_suffix(".said").read_text()
        outcomes[name] = {"status": status, "left": files_left, "again": second_status, "said": text}
    outputs = root / "twice-at-once"
    pids = [fork_child(partial(run_whole, outputs), root / f"twice-{n}.log") for n in range(2)]
    outcomes["twice at once"] = {"status": max(wait_for(*pids)), "left": [], "again": 0, "said": ""}
    (root / "found.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
