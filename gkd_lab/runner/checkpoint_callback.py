"""What every training does around its checkpoints: stop after a step when asked to, seal what was saved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gkd_lab.runner import interrupts
from gkd_lab.training.checkpoints import folder_of, seal
from gkd_lab.training.metric_accumulator import Averages

WINDOW = "window.json"
"""In a checkpoint between two rows of the history: what the next row will average besides later steps."""


class Saving(TrainerCallback):
    """For a training with checkpoints in these folders, one for each of its cells, and their averages."""

    def __init__(self, folders: Sequence[Path], averages: Averages | None = None) -> None:
        self.folders, self.averages = folders, averages

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for n, folder in enumerate(self.folders):
            place = folder_of(str(folder), state.global_step) / WINDOW
            if self.averages is not None and place.exists():
                _go_on(self.averages, n, json.loads(place.read_bytes()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if interrupts.is_asked():
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for n, folder in enumerate(self.folders):
            place = folder_of(str(folder), state.global_step)
            if not place.exists():
                continue  # a cell that has failed saves no more
            if self.averages is not None and self.averages.batches:
                (place / WINDOW).write_text(json.dumps(_window(self.averages, n)))
            seal(place)


def _window(averages: Averages, cell: int) -> dict[str, Any]:
    """A cell's sums; a float64 comes back from JSON as it was."""
    sums = {name: float(values[cell]) for name, values in averages.sums.items()}
    return {"batches": averages.batches, "sums": sums, "terms": averages.terms[:, cell].tolist()}


def _go_on(averages: Averages, cell: int, window: dict[str, Any]) -> None:
    averages.batches = window["batches"]
    for name in averages.sums.keys() & window["sums"].keys():
        averages.sums[name][cell] = window["sums"][name]
    # The pack that it was saved in may have had cells with more terms than any has here.
    terms = averages.terms.new_tensor(window["terms"])[: averages.most]
    averages.terms[: len(terms), cell] = terms
