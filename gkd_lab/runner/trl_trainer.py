"""TRL's own GKDTrainer on a cell's rows and record: the control arm `implementation: trl`.

The training step (coin, sampling, loss, its denominator) is TRL's, unchanged. Rows, their order, optimizer,
schedule, log rows and checkpoints are those of any cell; docs/trl.md lists what differs.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback

from gkd_lab.config.cell import Cell
from gkd_lab.config.fingerprint import replace_fields
from gkd_lab.config.loss_terms import ResolvedDivergence
from gkd_lab.encoding.batches import EpochCallback, Example, KeyedBatchSampler
from gkd_lab.runner.artifacts import LoadedModel
from gkd_lab.runner.build_trainer import build_distillation_arguments, build_row_logger
from gkd_lab.runner.dataset import SplitReport, encode_examples, load_split, write_split_report
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.store import Record
from gkd_lab.training.arguments import TrlGKDConfig
from gkd_lab.training.metric_accumulator import MetricAccumulator
from gkd_lab.training.pack_trainer import CellLogger, build_keyed_dataloader

# After `arguments`, which silences the warning that TRL's experimental names may move.
from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer  # isort: skip


class TrlCellTrainer(TrlGKDTrainer):
    """TRL's GKDTrainer with the row order of a cell's seed and its log rows.

    A loss or gradient that is not finite raises FloatingPointError: the cell fails, as one of ours does.
    """

    def __init__(self, log_cell: CellLogger, **options: Any) -> None:
        self.log_cell, self.metrics = log_cell, MetricAccumulator(1)
        super().__init__(**options)
        self.epoch_callback = EpochCallback()
        self.add_callback(self.epoch_callback)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of batches in the seed's own order, which cells of gkd_lab have too."""
        rows, args = len(self.train_dataset), self.args
        self.epoch_callback.batch_sampler = sampler = KeyedBatchSampler(
            rows, args.per_device_train_batch_size, [args.seed]
        )
        return build_keyed_dataloader(self, sampler)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run TRL's step, record what it trained on, and return its loss; see the class for errors."""
        reference_ids = inputs["input_ids"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_is_finite("loss", float(loss))
        # TRL puts the sampled completions into `inputs`.
        self._record_step(loss, inputs["labels"], is_on_policy=inputs["input_ids"] is not reference_ids)
        return loss

    def _record_step(self, loss: Tensor, labels: Tensor, *, is_on_policy: bool) -> None:
        """Add a step to the metrics: its loss, coin, trained tokens, and sampled rows without an end.

        labels: (B, T), -100 where nothing is trained.
        """
        end_id = self.generation_config.eos_token_id  # or several; 0 is one
        end_ids = torch.as_tensor([] if end_id is None else end_id, device=labels.device)
        n_truncated = int((~torch.isin(labels, end_ids).any(-1)).sum())
        self.metrics.add_sums(
            loss=float(loss),
            on_policy=len(labels) * is_on_policy,
            truncated=n_truncated * is_on_policy,
            rows=len(labels),
            tokens=int((labels != -100).sum()),
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the Trainer's gradient norm, before clipping, and record it."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:
            self._check_is_finite("gradient's norm", float(norm))
            self.metrics.add_grad_norms(torch.as_tensor(norm, dtype=torch.float64).reshape(1))
        return norm

    def _check_is_finite(self, name: str, value: float) -> None:
        """Raise FloatingPointError unless the value, a loss or norm called `name`, is finite."""
        if not math.isfinite(value):
            raise FloatingPointError(f"the {name} is {value} at step {self.state.global_step + 1}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the Trainer's log; with a loss in it, write the means since the last row to the record."""
        if "loss" in logs and self.metrics.n_batches:
            (row,) = self.metrics.pop_means()
            del row["entropy"]  # TRL does not compute it
            self.log_cell(0, {"step": self.state.global_step, **row, "learning_rate": logs["learning_rate"]})
        super().log(logs, start_time)


def build_trl_trainer(
    student: PreTrainedModel,
    teacher: LoadedModel,
    examples: Sequence[Example],
    cell: Cell,
    options: RunOptions,
    tokenizer: Any,
) -> TrlCellTrainer:
    """Return TRL's trainer of one cell, which trains `student` in place and logs to the cell's record."""
    training, record = cell.training, options.store.get_record(cell)
    (term,) = training.objectives
    assert isinstance(term, ResolvedDivergence) and term.beta is not None, "checked with the spec"
    max_length = training.max_input_tokens + training.max_output_tokens
    args = TrlGKDConfig(
        **build_distillation_arguments(cell, record, options, micro_batches=1),
        lmbda=training.source.lmbda,
        beta=term.beta,
        temperature=training.source.temperature or 1.0,
        max_length=max_length,
        # TRL samples without its cache otherwise: the same text, more slowly.
        gradient_checkpointing=False,
    )
    trainer = TrlCellTrainer(
        build_row_logger([record], options),
        model=student,
        teacher_model=teacher.model,
        args=args,
        train_dataset=datasets.Dataset.from_list(build_trl_rows(examples, max_length)),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- rows ----


def load_uncut_examples(cell: Cell, tokenizer: Any, record: Record, options: RunOptions) -> list[Example]:
    """Return the cell's examples at their full length, for TRL to cut; store the counts of cut rows.

    TRL cuts the prompt of a row that is too long; if its completion alone is, TRL's collator raises
    ValueError.
    """
    training = cell.training
    max_length = training.max_input_tokens + training.max_output_tokens
    rows = load_split(training.task, training.data, "train", options.cache_folder)
    uncut = replace_fields(training.start, max_input_tokens=sys.maxsize, max_output_tokens=sys.maxsize)
    examples, report = encode_examples(uncut, tokenizer, rows)
    n_cut = sum(len(e.prompt_ids) + len(e.completion_ids) > max_length for e in examples)
    write_split_report(record.folder, "train", SplitReport(report.rows, n_cut, 0, report.dropped))
    return examples[: training.train_rows]


def build_trl_rows(examples: Sequence[Example], max_length: int) -> list[dict[str, Any]]:
    """Return rows for TRL's collator: the last `max_length` tokens of prompt and completion together.

    So it cuts texts itself; ids it takes as they are.
    """
    rows = []
    for example in examples:
        ids = example.prompt_ids + example.completion_ids
        is_completion = [0] * len(example.prompt_ids) + [1] * len(example.completion_ids)
        rows.append(
            {"prompt": "", "input_ids": ids[-max_length:], "completion_mask": is_completion[-max_length:]}
        )
    return rows
