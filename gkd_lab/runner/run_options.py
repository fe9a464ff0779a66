"""Where and how to run; no option enters the fingerprint of a cell or changes its results."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gkd_lab.config.packs import PackLimit
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.trackers import Tracker
from gkd_lab.store import Store


@dataclass(frozen=True)
class RunOptions:
    """Options of one invocation of `gkd-lab run` or `gkd-lab cell`."""

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
    """What to do at the end about cells that other processes have locked: leave them or wait for them."""
    workers: int = 1
    """Processes of this run on this machine, which share its memory and its cells."""
    workers_on_gpu: int = 1
    """Those of them that share this process's GPU."""
    term_gradients: bool = False
    """Whether each logged row has the gradient norm of each loss term, `grad_norm/NAME`."""

    def __post_init__(self) -> None:
        # A row averages the steps since the last row; a resumed run must average the same steps.
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} is not a multiple of log_every {self.log_every}"
            )

    def count_sharing_workers(self, device: str) -> int:
        """Return the number of this run's processes that share the memory of a device: `cpu` or `cuda`."""
        return self.workers if device == "cpu" else self.workers_on_gpu

    @property
    def store(self) -> Store:
        """The store of all records below the outputs folder."""
        return Store(self.outputs)

    @property
    def cache_folder(self) -> Path:
        """Path of the folder where slow data sources cache their rows, `.cache` in the outputs."""
        return self.outputs / ".cache"


def select_device() -> str:
    """Return `cuda` if a GPU is available, else `cpu`; for all but trainers, which choose theirs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
