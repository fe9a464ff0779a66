"""What every training does around its checkpoints: stop after a step when asked to, seal what was saved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gkd_lab.runner import interrupts
from gkd_lab.training.checkpoints import build_checkpoint_path, write_checksums
from gkd_lab.training.metric_accumulator import MetricAccumulator

AVERAGES_FILE = "window.json"
"""In a checkpoint between two rows of the history: what the next row will average besides later steps."""


class CheckpointCallback(TrainerCallback):
    """For a training with checkpoints in these folders, one for each of its cells, and their averages."""

    def __init__(self, folders: Sequence[Path], averages: MetricAccumulator | None = None) -> None:
        self.folders, self.averages = folders, averages

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for n, folder in enumerate(self.folders):
            place = build_checkpoint_path(str(folder), state.global_step) / AVERAGES_FILE
            if self.averages is not None and place.exists():
                _restore_averages(self.averages, n, json.loads(place.read_bytes()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if interrupts.is_stop_requested():
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for n, folder in enumerate(self.folders):
            place = build_checkpoint_path(str(folder), state.global_step)
            if not place.exists():
                continue  # a cell that has failed saves no more
            if self.averages is not None and self.averages.n_batches:
                (place / AVERAGES_FILE).write_text(json.dumps(_encode_averages(self.averages, n)))
            write_checksums(place)


def _encode_averages(averages: MetricAccumulator, cell: int) -> dict[str, Any]:
    """A cell's sums; a float64 comes back from JSON as it was."""
    sums = {name: float(values[cell]) for name, values in averages.sums.items()}
    return {"batches": averages.n_batches, "sums": sums, "terms": averages.term_sums[:, cell].tolist()}


def _restore_averages(averages: MetricAccumulator, cell: int, stored_averages: dict[str, Any]) -> None:
    averages.n_batches = stored_averages["batches"]
    for name in averages.sums.keys() & stored_averages["sums"].keys():
        averages.sums[name][cell] = stored_averages["sums"][name]
    # The pack that it was saved in may have had cells with more terms than any has here.
    terms = averages.term_sums.new_tensor(stored_averages["terms"])[: averages.max_terms]
    averages.term_sums[: len(terms), cell] = terms
