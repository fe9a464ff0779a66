"""Runs at Weights & Biases: one a cell, many in one process; a sweep agent's process has the agent's one.

Without a login, or where the server cannot be reached, runs are kept offline for `wandb sync`.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import wandb

from gkd_lab.config import Cell
from gkd_lab.config.sweep import PROJECT
from gkd_lab.runner.progress import Reporter

SECONDS_TO_REACH = 30
SECONDS_TO_FINISH = 60
"""wandb retries for days by default; what was not sent stays on disk for `wandb sync`."""

_SETTINGS = {
    "silent": True,
    "console": "off",
    # The record's provenance says these without secrets; wandb would keep the command as it was typed.
    "x_disable_meta": True,
    "disable_git": True,
    "disable_code": True,
    "x_save_requirements": False,
}


Mode = Literal["online", "offline"]


class Wandb:
    """Opens runs; says once where they are."""

    def __init__(self, experiment: str, outputs: Path, reporter: Reporter) -> None:
        self.experiment, self.outputs, self.reporter = experiment, outputs, reporter
        self._mode: Mode | None = None
        self._said = False

    def open(self, cell: Cell, config: dict[str, Any]) -> "WandbRun":
        """The run of a cell; offline where there is no login or no answer."""
        wandb.setup(settings=wandb.Settings(silent=True))
        self._mode = self._mode or _mode()
        try:
            run = self._init(cell, config)
        except wandb.Error as error:
            if self._mode != "online" or self._said:
                raise
            wandb.teardown()  # the id counts as taken by the attempt that failed
            wandb.setup(settings=wandb.Settings(silent=True))
            self._mode = "offline"
            reason = " ".join(str(error).split())
            self.reporter.say(f"warning: wandb: its server cannot be used ({reason}); runs are kept offline")
            run = self._init(cell, config)
        self._say(run)
        return WandbRun(run)

    def _init(self, cell: Cell, config: dict[str, Any]) -> Any:
        agents = is_agents()
        # An agent has set project and id, which are its own.
        ours: dict[str, Any] = {} if agents else {"project": _project(), "id": run_id(cell)}
        return wandb.init(
            **ours,
            group=self.experiment,
            name=name_of(cell),
            config=config,
            dir=None if os.environ.get("WANDB_DIR") else str(self.outputs),
            mode=self._mode,
            resume="allow",
            reinit="default" if agents else "create_new",
            settings=wandb.Settings(**_SETTINGS, **_patience()),
        )

    def _say(self, run: Any) -> None:
        if self._said:
            return
        self._said = True
        if run.offline:
            place = Path(run.dir).parent.parent
            self.reporter.say(f"wandb: offline; `wandb sync {place}/offline-run-*` sends the runs later")
        elif run.url:
            self.reporter.say(f"wandb: {run.url if is_agents() else run.project_url}")


class WandbRun:
    """An open run."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.step = run.starting_step
        self.known = set(run.summary.keys())

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """A row of the history, sent at once."""
        self._run.log(dict(row), step=step, commit=True)

    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None:
        """Finish; an interrupted run of a sweep is one that an agent may resume."""
        self._run.summary.update(dict(summary))
        if interrupted:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)


def refused(why: str) -> None:
    """Tell the agent's run why no cell could be made of its parameters; a tracker's own fault is let go."""
    with suppress(Exception):
        wandb.setup(settings=wandb.Settings(silent=True))
        run = wandb.init(mode=_mode(), settings=wandb.Settings(**_SETTINGS, **_patience()))
        run.summary.update({"status": "failed", "error": why})
        run.finish(exit_code=2)


def is_agents() -> bool:
    """Whether a sweep agent started this process: the run is the agent's, and there is only one."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def run_id(cell: Cell) -> str:
    """The same wherever the cell is run, so that a resumed cell goes on with its run."""
    return cell.full_fingerprint[:16]


def name_of(cell: Cell) -> str:
    """Task and readable folder."""
    return cell.folder.partition("/")[2]


def _project() -> str:
    return os.environ.get("WANDB_PROJECT") or PROJECT


def _mode() -> Mode | None:
    """As WANDB_MODE says; without it, online where there is a login. Never asks for a key."""
    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def _patience() -> dict[str, float]:
    """How long to wait for the server, where no variable of wandb's says it."""
    limits = {"init_timeout": SECONDS_TO_REACH, "finish_timeout": SECONDS_TO_FINISH}
    return {name: float(value) for name, value in limits.items() if f"WANDB_{name.upper()}" not in os.environ}
