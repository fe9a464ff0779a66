"""Trainer callback for checkpoints: stop when requested, seal each checkpoint, restore logged averages."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gkd_lab.runner import interrupts
from gkd_lab.store.heartbeat import require_lock
from gkd_lab.training.checkpoints import build_checkpoint_path, write_checksums
from gkd_lab.training.metric_accumulator import MetricAccumulator

AVERAGES_FILE = "window.json"
"""File of a checkpoint between two rows of the history: the averages since the last row."""


class CheckpointCallback(TrainerCallback):
    """Callback of a training with one checkpoint folder per cell, and the averages that it logs."""

    def __init__(self, folders: Sequence[Path], averages: MetricAccumulator | None = None) -> None:
        self.folders, self.averages = folders, averages

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore each cell's metric sums from the checkpoint to resume from, if it stores them."""
        for n, folder in enumerate(self.folders):
            averages_file = build_checkpoint_path(str(folder), state.global_step) / AVERAGES_FILE
            if self.averages is not None and averages_file.exists():
                _restore_metric_sums(self.averages, n, json.loads(averages_file.read_bytes()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the Trainer save a checkpoint and stop, if SIGINT or SIGTERM was received.

        Raises LockLost if another process has a cell's lock: at once after a missed beat, else before saving.
        """
        if interrupts.is_stop_requested():
            control.should_save = control.should_training_stop = True
        if control.should_save:
            self._require_locks()

    def _require_locks(self) -> None:
        """Raise LockLost unless this process still holds the locks of all cells."""
        for folder in self.folders:
            require_lock(folder)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add metric sums and SHA-256 checksums to each cell's new checkpoint; a failed cell has none."""
        self._require_locks()
        for n, folder in enumerate(self.folders):
            checkpoint = build_checkpoint_path(str(folder), state.global_step)
            if not checkpoint.exists():
                continue  # a failed cell saves no checkpoint
            if self.averages is not None and self.averages.n_batches:
                (checkpoint / AVERAGES_FILE).write_text(json.dumps(_encode_metric_sums(self.averages, n)))
            write_checksums(checkpoint)


def _encode_metric_sums(averages: MetricAccumulator, cell: int) -> dict[str, Any]:
    """Return one cell's batch count, metric sums and loss term sums as a JSON dict, exact for float64."""
    values, names = averages.read_sums()[:, cell].tolist(), averages.sum_names
    sums = dict(zip(names, values, strict=False))
    return {"batches": averages.n_batches, "sums": sums, "terms": values[len(names) :]}


def _restore_metric_sums(averages: MetricAccumulator, cell: int, stored_averages: dict[str, Any]) -> None:
    """Overwrite one cell's sums in `averages`, and its batch count, with a dict of `_encode_metric_sums`.

    The pack that saved the checkpoint may have had cells with more terms than this one.
    """
    averages.n_batches = stored_averages["batches"]
    averages.set_cell_sums(cell, stored_averages["sums"], stored_averages["terms"])
