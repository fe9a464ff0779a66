"""transformers' Trainer for the K cells of a pack: row order, failures, logs, optimizer and checkpoints.

Shapes: K cells, S distinct seeds, B rows of a micro-batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from gkd_lab.encoding.batches import EpochCallback, KeyedBatchSampler
from gkd_lab.losses.cell_arguments import CellArguments, distinct_seeds
from gkd_lab.losses.terms import term_names
from gkd_lab.models.attention import upcast_cpu_attention
from gkd_lab.models.packing import Pack
from gkd_lab.training.metric_accumulator import MetricAccumulator
from gkd_lab.training.strategies import PackStrategy, StudentStrategy

CellLogger = Callable[[int, dict[str, float]], None]


class AllCellsFailed(FloatingPointError):
    """No cell is left to train; `GKDTrainer.failures` has the reason of each."""


def build_single_cell_property(name: str) -> property:
    """Build TRL's attribute `name` of the only cell, which a callback may read and set between steps."""

    def read_value(trainer: "PackTrainer") -> Any:
        """Return the only cell's value."""
        return getattr(trainer._get_single_cell(name), name)

    def set_value(trainer: "PackTrainer", value: float) -> None:
        """Replace the only cell's value."""
        changes: dict[str, Any] = {name: value}
        trainer.cells = (replace(trainer._get_single_cell(name), **changes),)

    return property(read_value, set_value)


class PackTrainer(Trainer):
    """Trains the cells of a pack apart: a failed cell is frozen, each has its own log rows and checkpoints.

    Args:
        pack, cells: K students in one model, and what differs between them.
        log_cell: Called with (cell, row) whenever the Trainer logs.
        on_failure: Called with (cell, reason) at once when a cell's loss or gradient is not finite.
        options: The Trainer's own arguments.

    Attributes:
        metrics: Sums of the cells' metrics since the last logged row.
        strategy: Updates and saves the students; the one place that distinguishes a single model from a pack.
        failures: Cell number -> reason.
    """

    optimizer: Any

    def __init__(
        self,
        pack: Pack,
        cells: Sequence[CellArguments],
        log_cell: CellLogger | None,
        on_failure: Callable[[int, str], None] | None,
        **options: Any,
    ) -> None:
        if len(cells) != pack.size:
            raise ValueError(f"{len(cells)} cells for a pack of {pack.size} models")
        self.pack, self.cells = pack, tuple(cells)
        self.seeds = distinct_seeds(self.cells)
        self.log_cell, self.on_failure = log_cell, on_failure
        self.failures: dict[int, str] = {}
        self.metrics = MetricAccumulator(
            len(self.cells), [term_names(cell.list_terms()) for cell in self.cells]
        )
        self.epoch_callback = EpochCallback()
        self.strategy = PackStrategy(self) if pack.is_packed else StudentStrategy(self)
        super().__init__(model=pack.model, **options)
        self.strategy.prepare()
        # The losses are divided by the whole step's items, whatever the number of micro-batches.
        self.loss_is_scaled_for_ga = True

    def _get_single_cell(self, name: str) -> CellArguments:
        """Return the only cell. Raises ValueError for a pack, whose cells differ in `name`."""
        if len(self.cells) > 1:
            raise ValueError(f"each of the {len(self.cells)} cells has its own {name}: use `trainer.cells`")
        return self.cells[0]

    # ---- failures ----

    def mask_running_cells(self, device: torch.device) -> Tensor:
        """Return whether each cell still trains, (K,)."""
        return torch.tensor([n not in self.failures for n in range(len(self.cells))], device=device)

    def fail_cell(self, cell: int, reason: str) -> None:
        """Freeze a cell; the others train on. Raises AllCellsFailed when it was the last."""
        if cell not in self.failures:
            self.failures[cell] = f"{reason} at step {self.state.global_step + 1}"
            if self.on_failure is not None:
                self.on_failure(cell, self.failures[cell])
        if len(self.failures) == len(self.cells):
            raise AllCellsFailed("; ".join(sorted(set(self.failures.values()))))

    # ---- values over all ranks ----

    def is_true_on_any_rank(self, value: bool) -> bool:
        """Whether `value` is true in any process."""
        if self.args.world_size == 1:
            return value
        return bool(self.accelerator.reduce(torch.tensor(float(value), device=self.args.device)) > 0)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the CPU."""
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def average_over_ranks(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="mean").cpu()

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of (S*B) rows in the order of each cell's seed; a stream keeps its own order."""
        if not hasattr(self.train_dataset, "__len__"):
            return super().get_train_dataloader()
        args, sampler = self.args, self.build_batch_sampler()
        self.epoch_callback.batch_sampler = sampler
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def build_batch_sampler(self) -> KeyedBatchSampler:
        """Build the sampler of row numbers, whose order depends on seed and epoch alone."""
        return KeyedBatchSampler(
            len(self.train_dataset),
            self._train_batch_size,
            self.seeds,
            drop_last=self.args.dataloader_drop_last,
            shuffled=self.args.train_sampling_strategy == "random",
        )

    # ---- precision ----

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Run the Trainer's step, backward pass included, in the attention's precision."""
        with self.use_float32_attention():
            return super().training_step(*args, **options)

    def use_float32_attention(self) -> AbstractContextManager[Any]:
        """Compute attention in float32 on a CPU under autocast."""
        return upcast_cpu_attention(
            self.args.device.type == "cpu" and self.accelerator.mixed_precision in ("bf16", "fp16")
        )

    @contextmanager
    def use_run_precision(self) -> Iterator[None]:
        """Compute under the run's autocast."""
        with self.use_float32_attention(), self.accelerator.autocast():
            yield

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer unless the user gave one."""
        create = partial(super().create_optimizer, model)
        return create() if self.optimizer is not None else self.strategy.create_optimizer(create)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradient as the strategy does."""
        return self.strategy.clip_gradients(partial(super()._clip_grad_norm, model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm that the Trainer logs, and record each cell's."""
        return self.strategy.compute_grad_norm(partial(super()._get_grad_norm, model, grad_norm))

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the Trainer's own log, and a row for each cell; a single cell's row is part of the log."""
        if "loss" in logs and self.metrics.n_batches:
            rows = self.metrics.pop_means(self.average_over_ranks)
            for n, (cell, row) in enumerate(zip(self.cells, rows, strict=True)):
                if "learning_rate" in logs:
                    factor = logs["learning_rate"] / (self.cells[0].learning_rate or 1)
                    row["learning_rate"] = cell.learning_rate * factor
                row |= self.get_extra_metrics(n)
                if self.log_cell is not None and n not in self.failures:
                    self.log_cell(n, {"step": self.state.global_step, **row})
            if len(rows) == 1:
                logs = {**rows[0], **logs}
        super().log(logs, start_time)

    def get_extra_metrics(self, cell: int) -> dict[str, float]:
        """Return more values of the cell's last step, for its row."""
        return {}

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write each cell's checkpoint of the current step."""
        save = partial(super()._save_checkpoint, model, trial)
        self.strategy.save_checkpoint(save, self._get_output_dir(trial=trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load each cell's weights and extra state."""
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self.strategy.load_weights(load, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load each cell's optimizer state and set the schedule to the checkpoint's step."""
        load = partial(super()._load_optimizer_and_scheduler, checkpoint)
        self.strategy.load_optimizer(load, checkpoint)

    def save_extra_state(self, cell: int, folder: Path) -> None:
        """Write a cell's state besides weights and optimizer into its checkpoint."""

    def load_extra_state(self, cell: int, folder: Path) -> None:
        """Load what `save_extra_state` wrote."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: random choices are keyed by the step, and a stored state would replace its dropout."""

    # ---- TRL's and the Trainer's other methods ----

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **fields: Any,
    ) -> None:
        """Write README.md beside the model; `fields` are the Trainer's own, by name."""
        super().create_model_card(model_name=model_name, dataset=dataset_name, tags=tags, **fields)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: the Trainer's rule knows neither the teacher nor the sampling."""
        return 0
