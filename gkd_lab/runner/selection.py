"""Select a checkpoint during training: decode validation rows every so many steps, keep the best weights.

The scores stand in the record's `selection.jsonl`, the weights of each improvement below its `steps` folder
until the training is done. A resumed training drops what lies after its step, so it selects the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from gkd_lab.config.cell import Cell
from gkd_lab.models.packing import Pack
from gkd_lab.runner.dataset import encode_examples, load_split, take_first_rows
from gkd_lab.runner.greedy_scores import score_greedily
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import Record
from gkd_lab.store.heartbeat import require_lock

_FOLDER = "improved"


class SelectionCallback(TrainerCallback):
    """Callback that scores a pack's cells on validation rows, and saves the weights of each improvement."""

    def __init__(self, pack: Pack, tokenizer: Any, cells: Sequence[Cell], options: RunOptions) -> None:
        training = cells[0].training
        assert training.selection is not None, "a training with a selection"
        self.pack, self.tokenizer, self.selection = pack, tokenizer, training.selection
        self.records = [options.store.get_record(cell) for cell in cells]
        rows = load_split(training.task, training.data, "validation", options.cache_folder)
        self.rows = take_first_rows(rows, training.selection.rows)
        self.examples, _ = encode_examples(training.start, tokenizer, self.rows)
        self.max_output_tokens = training.max_output_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score the pack at every multiple of `every` and at the last step."""
        if state.global_step % self.selection.every == 0 or state.global_step == args.max_steps:
            self._score_cells(state.global_step)

    def _score_cells(self, step: int) -> None:
        """Append each cell's score to its record, and save its weights if it is the cell's best so far."""
        metric = self.selection.metric
        scores = score_greedily(
            self.pack, self.tokenizer, self.rows, self.examples, self.max_output_tokens, metric
        )
        for n, (record, score) in enumerate(zip(self.records, scores, strict=True)):
            if record.read_status():
                continue  # it has failed
            best = max((row[metric] for row in record.read_selection()), default=None)
            record.log_selection({"step": step, metric: score})
            if best is None or score > best:
                weights = self.pack.get_cell_parameters(n)
                path = _build_weights_path(record, step)
                require_lock(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, path)


def load_best_weights(record: Record, metric: str) -> dict[str, torch.Tensor]:
    """Return the weights of a record's best step; of equal scores the earliest."""
    best = max(record.read_selection(), key=lambda row: (row[metric], -row["step"]))
    return load_file(_build_weights_path(record, best["step"]))


def _build_weights_path(record: Record, step: int) -> Path:
    """Return the path of the weights that improved at a step."""
    return record.steps_folder / _FOLDER / f"{step}.safetensors"
