"""Where and how to run: nothing in here can change what a cell is, or enter its fingerprint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gkd_lab.config.packs import PackLimit
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.trackers import Tracker
from gkd_lab.store import Store


@dataclass(frozen=True)
class RunOptions:
    """Choices of one invocation."""

    outputs: Path
    pack: PackLimit = "auto"
    retry_failed: bool = False
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints to resume from."""
    log_every: int = 20
    """Optimizer steps between two rows of a cell's metrics.jsonl."""
    reporter: Reporter = field(default_factory=Reporter)
    tracker: Tracker = field(default_factory=Tracker)
    busy_cells: Literal["pass", "wait"] = "pass"
    """What to do about cells that other processes work on, once nothing else is left."""
    workers: int = 1
    """Processes of this run on this machine, which share its memory and its cells."""
    term_gradients: bool = False
    """Whether each log line has the norm of each term's gradient, `grad_norm/NAME`."""

    def __post_init__(self) -> None:
        # A row averages the steps since the last one: a resumed run must start a window where the other did.
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} is not a multiple of log_every {self.log_every}"
            )

    @property
    def store(self) -> Store:
        return Store(self.outputs)

    @property
    def cache_folder(self) -> Path:
        """Where slow sources keep what they read."""
        return self.outputs / ".cache"


def select_device() -> str:
    """Where models are put for evaluation; trainers find theirs by themselves."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
