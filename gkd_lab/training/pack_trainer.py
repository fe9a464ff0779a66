"""transformers' Trainer for the K cells of a pack: row order, failures, logs, optimizer and checkpoints.

Shapes: K cells, S distinct seeds, B rows of a micro-batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
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


def build_keyed_dataloader(trainer: Trainer, sampler: KeyedBatchSampler) -> DataLoader:
    """Return the trainer's loader of its training rows, in the sampler's batches, prepared by accelerate."""
    args = trainer.args
    loader = DataLoader(
        trainer.train_dataset,
        batch_sampler=sampler,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return trainer.accelerator.prepare(loader)


def build_single_cell_property(name: str) -> property:
    """Build a trainer property that reads and sets field `name` of the only cell; ValueError in a pack."""

    def read_value(trainer: "PackTrainer") -> Any:
        """Return the only cell's value of the field; ValueError in a pack."""
        return getattr(trainer._get_single_cell(name), name)

    def set_value(trainer: "PackTrainer", value: float) -> None:
        """Replace `trainer.cells` by a copy of the only cell with the new value.

        ValueError in a pack, and for the beta of a loss whose `objectives` state theirs.
        """
        cell = trainer._get_single_cell(name)
        if name == "beta" and cell.objectives:
            raise ValueError("beta: each divergence of `objectives` has its own; set `objectives` instead")
        changes: dict[str, Any] = {name: value}
        trainer.cells = (replace(cell, **changes),)

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
    text_copies = 1
    """Number of completions of each row in the training examples; every epoch takes the next ones."""

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
        self._filters_losses = self.args.logging_nan_inf_filter
        self._step_losses: Tensor | None = None
        self._is_running = torch.ones(len(self.cells), dtype=torch.bool)

    def _get_single_cell(self, name: str) -> CellArguments:
        """Return the only cell's arguments; for several, ValueError that names the attribute `name`."""
        if len(self.cells) > 1:
            raise ValueError(f"each of the {len(self.cells)} cells has its own {name}: use `trainer.cells`")
        return self.cells[0]

    # ---- failures ----

    def mask_running_cells(self, device: torch.device) -> Tensor:
        """Return a bool tensor (K,): True for each cell that has not failed."""
        if self._is_running.device != device:
            self._is_running = self._is_running.to(device)
        return self._is_running

    def fail_cell(self, cell: int, reason: str) -> None:
        """Freeze a cell, keep its first reason, call on_failure; AllCellsFailed if no cell is left."""
        if cell not in self.failures:
            self.failures[cell] = f"{reason} at step {self.state.global_step + 1}"
            self._is_running[cell] = False
            if self.on_failure is not None:
                self.on_failure(cell, self.failures[cell])
        if len(self.failures) == len(self.cells):
            raise AllCellsFailed("; ".join(sorted(set(self.failures.values()))))

    def note_losses(self, losses: Tensor) -> None:
        """Keep the cells' losses, (K,), of a micro-batch until `check_step`: the first that is not finite."""
        previous = self._step_losses
        self._step_losses = losses if previous is None else torch.where(previous.isfinite(), losses, previous)

    def check_step(self, norms: Tensor | None) -> None:
        """Fail the cells whose loss or gradient's norm, (K,) or None, is not finite; before the update.

        The device is read once, when the whole step has been launched. A loss that is not finite in one
        process fails the cell in all of them, which otherwise would wait for it.
        """
        losses, self._step_losses = self._step_losses, None
        parts = {"losses": losses, "norms": norms}
        tensors = {name: part.reshape(-1) for name, part in parts.items() if part is not None}
        if losses is not None and self.args.world_size > 1:
            bad_ranks = self.sum_over_ranks((~losses.isfinite()).double())
            tensors["bad_ranks"] = bad_ranks.to(losses.device)
        if not tensors:
            return
        values = iter(torch.cat(list(tensors.values())).tolist())  # in the widest of their dtypes
        read = {name: list(islice(values, len(tensor))) for name, tensor in tensors.items()}
        for n, loss in enumerate(read.get("losses", ())):
            if not math.isfinite(loss):
                self.fail_cell(n, f"the loss is {loss}")
            elif any(read.get("bad_ranks", ())[n : n + 1]):
                self.fail_cell(n, f"the loss is {loss} in this process and not finite in another")
        for n, norm in enumerate(read.get("norms", ())):
            if not math.isfinite(norm):
                self.fail_cell(n, f"the gradient's norm is {norm}")

    # ---- values over all ranks ----

    def is_true_on_any_rank(self, value: bool) -> bool:
        """Return whether `value` is true in any process; all processes must call it."""
        if self.args.world_size == 1:
            return value
        return bool(self.accelerator.reduce(torch.tensor(float(value), device=self.args.device)) > 0)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the elementwise sum of the tensor over all processes, on the CPU; all must call it."""
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def average_over_ranks(self, values: Tensor) -> Tensor:
        """Return the elementwise mean of the tensor over all processes; all must call it."""
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="mean").cpu()

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of S*B rows a batch, B in each seed's own order; a stream keeps its order."""
        if not hasattr(self.train_dataset, "__len__"):
            return super().get_train_dataloader()
        self.epoch_callback.batch_sampler = sampler = self.build_batch_sampler()
        return build_keyed_dataloader(self, sampler)

    def build_batch_sampler(self) -> KeyedBatchSampler:
        """Build the sampler of batches of row numbers, S blocks of B, ordered by seed and epoch alone."""
        return KeyedBatchSampler(
            len(self.train_dataset) // self.text_copies,
            self._train_batch_size,
            self.seeds,
            drop_last=self.args.dataloader_drop_last,
            shuffled=self.args.train_sampling_strategy == "random",
            copies=self.text_copies,
        )

    # ---- waits for the device ----

    def train(self, *args: Any, **options: Any) -> Any:
        """Run and return the Trainer's training, without its filter of losses, which would read each one.

        Losses that are not finite are left out of the sum before it.
        """
        with self._filter_losses(False):
            return super().train(*args, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Run and return the Trainer's evaluation, with the filter of losses that the arguments ask for."""
        with self._filter_losses(self._filters_losses):
            return super().evaluation_loop(*args, **options)

    @contextmanager
    def _filter_losses(self, value: bool) -> Iterator[None]:
        """Set `args.logging_nan_inf_filter` for the duration of the block."""
        before, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, value
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter = before

    # ---- precision ----

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Run a micro-batch's forward and backward pass and return its loss (CPU: attention in float32)."""
        with self.use_float32_attention():
            return super().training_step(*args, **options)

    def use_float32_attention(self) -> AbstractContextManager[Any]:
        """Return a context: attention in float32 on a CPU under autocast, no effect anywhere else."""
        return upcast_cpu_attention(
            self.args.device.type == "cpu" and self.accelerator.mixed_precision in ("bf16", "fp16")
        )

    @contextmanager
    def use_run_precision(self) -> Iterator[None]:
        """Enter the run's autocast, with attention in float32 on a CPU, for the duration of the block."""
        with self.use_float32_attention(), self.accelerator.autocast():
            yield

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the user's optimizer; without one create the strategy's, with each cell's learning rate."""
        create = partial(super().create_optimizer, model)
        return create() if self.optimizer is not None else self.strategy.create_optimizer(create)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip one model's gradient, return its norm before; in a pack do nothing: _get_grad_norm clips."""
        return self.strategy.clip_gradients(partial(super()._clip_grad_norm, model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Clip a pack's cells, record norms, return the running cells' mean norm; not finite: the cell fails.

        Norms are those before clipping; a single model was clipped by `_clip_grad_norm`.
        """
        return self.strategy.clip_and_record_norms(partial(super()._get_grad_norm, model, grad_norm))

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the Trainer's log; with a loss in it, pass each running cell's means to log_cell and reset.

        A single cell's means are also part of the Trainer's log.
        """
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
        """Return further log values of the cell, name -> value; here none, for subclasses to override."""
        return {}

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the step's checkpoint: one model as the Trainer does, a pack's running cells each apart."""
        save = partial(super()._save_checkpoint, model, trial)
        self.strategy.save_checkpoint(save, self._get_output_dir(trial=trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load each cell's weights and extra state from the checkpoint, or in a pack from its own folder."""
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self.strategy.load_weights(load, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load each cell's optimizer state and set the learning rate schedule to the checkpoint's step."""
        load = partial(super()._load_optimizer_and_scheduler, checkpoint)
        self.strategy.load_optimizer(load, checkpoint)

    def save_extra_state(self, cell: int, folder: Path) -> None:
        """Write a cell's further state into its checkpoint; here nothing, for subclasses to override."""

    def load_extra_state(self, cell: int, folder: Path) -> None:
        """Load what `save_extra_state` wrote for a cell; here nothing, for subclasses to override."""

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
        """Write README.md into the output folder; `dataset_name` is passed on as the Trainer's `dataset`.

        `fields` are the Trainer's own, by name.
        """
        super().create_model_card(model_name=model_name, dataset=dataset_name, tags=tags, **fields)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: the Trainer's rule knows neither the teacher nor the sampling."""
        return 0
