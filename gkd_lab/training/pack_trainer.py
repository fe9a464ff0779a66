"""transformers' Trainer for the K cells of a pack: their optimizer, clipping, failures, logs and checkpoints.

A pack of one plain model is left to the Trainer wherever that does the same. Shapes: K cells.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from gkd_lab.losses.cell_arguments import CellArguments, distinct_seeds
from gkd_lab.losses.terms import term_names
from gkd_lab.models.packing import Pack
from gkd_lab.training import checkpoints, packed_optimizer
from gkd_lab.training.metric_accumulator import MetricAccumulator

CellLogger = Callable[[int, dict[str, float]], None]


class AllCellsFailed(FloatingPointError):
    """No cell is left to train; `GKDTrainer.failures` says why for each."""


def build_single_cell_property(name: str) -> property:
    """TRL's attribute of this name, which a callback may read and set between steps."""

    def read(trainer: "PackTrainer") -> Any:
        return getattr(trainer._get_single_cell(name), name)

    def write(trainer: "PackTrainer", value: float) -> None:
        changed: dict[str, Any] = {name: value}
        trainer.cells = (replace(trainer._get_single_cell(name), **changed),)

    return property(read, write)


class _UpdateParameterViews(TrainerCallback):
    """A model that is moved when the training begins takes its optimizer's views along."""

    def __init__(self, trainer: "PackTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **state: Any) -> None:
        packed_optimizer.reattach_parameter_views(self.trainer.cell_parameters, self.trainer.pack)


class PackTrainer(Trainer):
    """What each cell of a pack keeps to itself.

    Args:
        pack, cells: K students in one model, and what differs between them.
        log_cell: Called with (cell, row) whenever the Trainer logs.
        on_failure: Called with (cell, why) at once when a cell's loss or gradient is no number.
        options: The Trainer's own arguments.
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
        self.cell_parameters: packed_optimizer.CellParameters = []
        super().__init__(model=pack.model, **options)
        if pack.is_packed and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"a pack of {pack.size} cells cannot be sharded by FSDP or DeepSpeed: run the cells alone "
                "(`--pack off`)"
            )
        if pack.is_packed:
            self.add_callback(_UpdateParameterViews(self))
        # The losses are divided by the whole step's items, whatever the number of micro-batches.
        self.loss_is_scaled_for_ga = True

    def _get_single_cell(self, name: str) -> CellArguments:
        if len(self.cells) > 1:
            raise ValueError(f"each of the {len(self.cells)} cells has its own {name}: use `trainer.cells`")
        return self.cells[0]

    # ---- failures ----

    def _mask_running_cells(self, device: torch.device) -> Tensor:
        return torch.tensor([n not in self.failures for n in range(len(self.cells))], device=device)

    def _fail_cell(self, cell: int, reason: str) -> None:
        """Freeze a cell; its neighbours go on."""
        if cell not in self.failures:
            self.failures[cell] = f"{reason} at step {self.state.global_step + 1}"
            if self.on_failure is not None:
                self.on_failure(cell, self.failures[cell])
        if len(self.failures) == len(self.cells):
            raise AllCellsFailed("; ".join(sorted(set(self.failures.values()))))

    # ---- optimizer: one pair of parameter groups a cell, on views of the pack's weights ----

    def create_optimizer(self, model: Any = None) -> Any:
        """A packed model's optimizer sees each cell's weights in their own shapes."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        if not self.pack.is_packed:
            optimizer = super().create_optimizer(model)
            for group in optimizer.param_groups:
                if group["lr"] == self.args.learning_rate:
                    group["lr"] = self.cells[0].learning_rate
            return optimizer
        self.cell_parameters = packed_optimizer.create_parameter_views(self.pack)
        decayed = set(self.get_decay_parameter_names(self.pack.unpack_cell(0)))
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = kind(
            packed_optimizer.build_parameter_groups(
                self.cell_parameters, self.cells, decayed, self.args.weight_decay
            ),
            **options,
        )
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clipping is per cell and is done where the norms are taken."""
        return None if self.pack.is_packed else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.pack.is_packed:
            norms = packed_optimizer.clip_cell_gradients(
                self.model,
                self.cell_parameters,
                self.args.max_grad_norm,
                self.failures.keys(),
                self._fail_cell,
            )
            self.metrics.add_grad_norms(norms)
            return norms[self._mask_running_cells(norms.device)].mean()
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):  # of shards
            norm = norm.full_tensor()
        if norm is not None:
            self.metrics.add_grad_norms(torch.as_tensor(norm, dtype=torch.float64).reshape(1))
            # fp16 overflows now and then, and its scaler skips that step.
            if not self.args.fp16 and not torch.as_tensor(norm).isfinite():
                self._fail_cell(0, f"the gradient's norm is {float(norm)}")
        return norm

    # ---- logs and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's own log, and a row for each cell; a single cell's row is part of the log."""
        if "loss" in logs and self.metrics.n_batches:
            rows = self.metrics.pop_means(self._average_over_ranks)
            for n, (cell, row) in enumerate(zip(self.cells, rows, strict=True)):
                if "learning_rate" in logs:
                    factor = logs["learning_rate"] / (self.cells[0].learning_rate or 1)
                    row["learning_rate"] = cell.learning_rate * factor
                row |= self._get_extra_metrics(n)
                if self.log_cell is not None and n not in self.failures:
                    self.log_cell(n, {"step": self.state.global_step, **row})
            if len(rows) == 1:
                logs = {**rows[0], **logs}
        super().log(logs, start_time)

    def _is_true_on_any_rank(self, value: bool) -> bool:
        if self.args.world_size == 1:
            return value
        return bool(self.accelerator.reduce(torch.tensor(float(value), device=self.args.device)) > 0)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def _average_over_ranks(self, sums: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return sums
        return self.accelerator.reduce(sums.to(self.args.device), reduction="mean").cpu()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Each cell's own folder, all of them before any older one goes."""
        step = self.state.global_step
        if not self.pack.is_packed:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._save_extra_state(
                    0, checkpoints.build_checkpoint_path(self._get_output_dir(trial=trial), step)
                )
            return
        for n, cell in enumerate(self.cells if self.args.should_save else ()):
            if n in self.failures:
                continue
            with checkpoints.create_folder_atomically(
                checkpoints.build_checkpoint_path(cell.output_dir, step)
            ) as folder:
                checkpoints.save_cell_checkpoint(
                    folder, self.pack.get_cell_parameters(n), self.cell_parameters[n], self.optimizer
                )
                self._save_extra_state(n, folder)
                self.state.save_to_json(str(folder / "trainer_state.json"))
        for cell in self.cells if self.args.should_save else ():
            checkpoints.remove_other_checkpoints(cell.output_dir, step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.pack.is_packed:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_extra_state(0, Path(resume_from_checkpoint))
            return
        for n, folder in self._list_cell_checkpoints(resume_from_checkpoint):
            self.pack.load_cell(n, checkpoints.load_checkpoint_weights(folder))
            self._load_extra_state(n, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.pack.is_packed:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            for n, folder in self._list_cell_checkpoints(checkpoint):
                checkpoints.load_optimizer_state(folder, self.cell_parameters[n], self.optimizer)
            checkpoints.set_scheduler_step(self.lr_scheduler, self.optimizer, self.state.global_step)

    # ---- what a subclass keeps of each cell besides its weights ----

    def _get_extra_metrics(self, cell: int) -> dict[str, float]:
        """More of the cell's last step, for its row."""
        return {}

    def _save_extra_state(self, cell: int, folder: Path) -> None:
        """Into the cell's checkpoint."""

    def _load_extra_state(self, cell: int, folder: Path) -> None:
        """From the cell's checkpoint."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: random choices are keyed by the step, and a stored state would replace its dropout."""

    def _list_cell_checkpoints(self, checkpoint: str) -> Iterator[tuple[int, Path]]:
        step = checkpoints.parse_checkpoint_step(Path(checkpoint))
        for n, cell in enumerate(self.cells):
            yield n, checkpoints.build_checkpoint_path(cell.output_dir, step)

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
        """Not estimated: the Trainer's rule knows neither the teacher nor the sampling."""
        return 0
