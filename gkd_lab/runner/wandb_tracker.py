"""Runs at Weights & Biases: one per cell; under a sweep agent, a process has only the agent's run.

Without a login, or where the server cannot be reached, runs are stored offline for `wandb sync`.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import wandb

from gkd_lab.config import Cell
from gkd_lab.config.sweep import WANDB_PROJECT
from gkd_lab.runner.progress import Reporter

INIT_TIMEOUT_SECONDS = 30
FINISH_TIMEOUT_SECONDS = 60
"""wandb retries for days by default; unsent data stays on disk for `wandb sync`."""

_SETTINGS = {
    "silent": True,
    "console": "off",
    # The record's provenance has these without secrets; wandb would store the command with them.
    "x_disable_meta": True,
    "disable_git": True,
    "disable_code": True,
    "x_save_requirements": False,
}


Mode = Literal["online", "offline"]


class WandbClient:
    """Client that opens runs, and prints once where they are."""

    def __init__(self, experiment: str, outputs: Path, reporter: Reporter) -> None:
        self.experiment, self.outputs, self.reporter = experiment, outputs, reporter
        self._mode: Mode | None = None
        self._has_reported = False

    def open_run(self, cell: Cell, config: dict[str, Any]) -> "WandbRun":
        """Open or resume the cell's run; offline without a login, or if the server refuses the first run."""
        wandb.setup(settings=wandb.Settings(silent=True))
        self._mode = self._mode or _choose_mode()
        try:
            run = self._init_run(cell, config)
        except wandb.Error as error:
            if self._mode != "online" or self._has_reported:
                raise
            wandb.teardown()  # otherwise the failed attempt occupies the run's id
            wandb.setup(settings=wandb.Settings(silent=True))
            self._mode = "offline"
            reason = " ".join(str(error).split())
            self.reporter.say(f"warning: wandb: its server cannot be used ({reason}); runs are offline")
            run = self._init_run(cell, config)
        self._report_location(run)
        return WandbRun(run)

    def _init_run(self, cell: Cell, config: dict[str, Any]) -> Any:
        """Return `wandb.init`'s run of a cell; project and id are set here, except under a sweep agent."""
        has_agent = is_sweep_agent()
        identity: dict[str, Any] = (
            {} if has_agent else {"project": _choose_project(), "id": build_run_id(cell)}
        )
        return wandb.init(
            **identity,
            group=self.experiment,
            name=build_run_name(cell),
            config=config,
            dir=None if os.environ.get("WANDB_DIR") else str(self.outputs),
            mode=self._mode,
            resume="allow",
            reinit="default" if has_agent else "create_new",
            settings=wandb.Settings(**_SETTINGS, **_choose_timeouts()),
        )

    def _report_location(self, run: Any) -> None:
        """Print for the first run only where runs are: a web page, or offline the command to send them."""
        if self._has_reported:
            return
        self._has_reported = True
        if run.offline:
            folder = Path(run.dir).parent.parent
            self.reporter.say(f"wandb: offline; `wandb sync {folder}/offline-run-*` sends the runs later")
        elif run.url:
            self.reporter.say(f"wandb: {run.url if is_sweep_agent() else run.project_url}")


class WandbRun:
    """Open run at Weights & Biases."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.next_step = run.starting_step
        self.logged_scores = set(run.summary.keys())

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send a row of values at a step, at once."""
        self._run.log(dict(row), step=step, commit=True)

    def end(self, summary: Mapping[str, Any], exit_code: int, *, interrupted: bool) -> None:
        """Write the summary and finish the run; `interrupted` lets a sweep agent resume it."""
        self._run.summary.update(dict(summary))
        if interrupted:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)


def report_refused_parameters(reason: str) -> None:
    """End the sweep agent's run as failed, its parameters being no valid cell; ignore errors of wandb."""
    with suppress(Exception):
        wandb.setup(settings=wandb.Settings(silent=True))
        run = wandb.init(mode=_choose_mode(), settings=wandb.Settings(**_SETTINGS, **_choose_timeouts()))
        run.summary.update({"status": "failed", "error": reason})
        run.finish(exit_code=2)


def is_sweep_agent() -> bool:
    """Return whether a wandb sweep agent started this process, by WANDB_SWEEP_ID in the environment."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def build_run_id(cell: Cell) -> str:
    """Return the fingerprint's first 16 digits as run id, so that a resumed cell resumes its run."""
    return cell.full_fingerprint[:16]


def build_run_name(cell: Cell) -> str:
    """Return the cell's folder without the scale as run name: `TASK/CELL`."""
    return cell.folder.partition("/")[2]


def _choose_project() -> str:
    """Return the project in the variable WANDB_PROJECT, or this project's default."""
    return os.environ.get("WANDB_PROJECT") or WANDB_PROJECT


def _choose_mode() -> Mode | None:
    """Return None if WANDB_MODE is set, which wandb obeys; else `online` with a login, else `offline`.

    Never asks for a key.
    """
    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def _choose_timeouts() -> dict[str, float]:
    """Return settings `init_timeout` and `finish_timeout` in seconds, except those that a variable sets."""
    limits = {"init_timeout": INIT_TIMEOUT_SECONDS, "finish_timeout": FINISH_TIMEOUT_SECONDS}
    return {name: float(value) for name, value in limits.items() if f"WANDB_{name.upper()}" not in os.environ}
