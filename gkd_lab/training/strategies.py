"""Update and save students: a single model by transformers' Trainer, a pack cell by cell.

A pack's optimizer sees views of its weights (`pack_optimizer`): clipping, learning rate and checkpoints are a
cell's own. Shapes: K cells.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gkd_lab.models.forward import Sequences
from gkd_lab.models.projection import HALF_DTYPES
from gkd_lab.training import checkpoints
from gkd_lab.training.adapters import TaskAdapter
from gkd_lab.training.callbacks import ParameterViewsCallback
from gkd_lab.training.pack_optimizer import (
    STACKABLE_OPTIMIZERS,
    FrozenCells,
    ParameterBlock,
    build_blocks,
    build_parameter_groups,
    hand_over_gradients,
    is_number,
)

if TYPE_CHECKING:
    from gkd_lab.training.pack_trainer import PackTrainer


class StudentStrategy:
    """Updates and saves one plain model as the Trainer does.

    A method gets the Trainer's own method to call or to replace.
    """

    def __init__(self, trainer: "PackTrainer") -> None:
        self.trainer = trainer

    def prepare(self) -> None:
        """Do nothing: a single model fits every placement (a pack checks its own)."""

    def create_optimizer(self, create: Callable[[], Any]) -> Any:
        """Return the optimizer of `create`, with the cell's learning rate in place of that of `args`."""
        optimizer = create()
        for group in optimizer.param_groups:
            if group["lr"] == self.trainer.args.learning_rate:
                group["lr"] = self.trainer.cells[0].learning_rate
        return optimizer

    def clip_gradients(self, clip: Callable[[], Any]) -> Any:
        """Clip by `clip`, the Trainer's own method, and return the norm before clipping."""
        return clip()

    def clip_and_record_norms(self, compute: Callable[[], Any]) -> Any:
        """Record and return the norm (the Trainer has clipped); not finite fails the cell, except in fp16."""
        norm = compute()
        if isinstance(norm, DTensor):  # of shards
            norm = norm.full_tensor()
        norms = None if norm is None else torch.as_tensor(norm, dtype=torch.float64).reshape(1)
        if norms is not None:
            self.trainer.metrics.add_grad_norms(norms)
        # fp16 overflows now and then, and its scaler skips that step.
        self.trainer.check_step(None if self.trainer.args.fp16 else norms)
        return norm

    def save_checkpoint(self, save: Callable[[], None], run_folder: str) -> None:
        """Write the Trainer's checkpoint by `save`, then the cell's extra state into its folder."""
        step = self.trainer.state.global_step
        save()
        if self.trainer.args.should_save:
            self.trainer.save_extra_state(0, checkpoints.build_checkpoint_path(run_folder, step))

    def load_weights(self, load: Callable[[], None], checkpoint: str) -> None:
        """Load the weights by `load`, the Trainer's own method, then the cell's extra state."""
        load()
        self.trainer.load_extra_state(0, Path(checkpoint))

    def load_optimizer(self, load: Callable[[], None], checkpoint: str | None) -> None:
        """Load optimizer and schedule by `load`, the Trainer's own method."""
        load()

    def convert_item_count(self, items: Tensor | None) -> Any:
        """Return the only cell's count as a scalar tensor (TRL subclasses divide by it); None stays None."""
        return None if items is None else items[0]

    def build_trl_fields(self, adapter: TaskAdapter, rows: Sequences) -> dict[str, Tensor]:
        """Return the rows as TRL's batch tensors by name."""
        return adapter.build_trl_fields(rows)

    def compute_predictions(
        self, adapter: TaskAdapter, model: Any, rows: Sequences
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the model and return the (logits, labels) that `compute_metrics` gets."""
        return adapter.compute_logits_and_labels(model, rows)


class PackStrategy(StudentStrategy):
    """Updates and saves K students in one model: optimizer groups, clipping and checkpoints per cell.

    Attributes:
        blocks: What the optimizer updates; empty before it exists.
        frozen: Weights of failed cells.
    """

    def __init__(self, trainer: "PackTrainer") -> None:
        super().__init__(trainer)
        self.pack = trainer.pack
        self.blocks: list[ParameterBlock] = []
        self.frozen = FrozenCells(self.pack)

    def prepare(self) -> None:
        """Raise ValueError for FSDP, DeepSpeed or vLLM; add the callback that renews the parameter views."""
        trainer = self.trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                f"a pack of {self.pack.size} cells cannot be sharded by FSDP or DeepSpeed: run the cells "
                "alone (`--pack off`)"
            )
        if trainer.args.use_vllm:
            raise ValueError("use_vllm serves one student: run the cells alone (`--pack off`)")
        trainer.add_callback(ParameterViewsCallback(self))

    def create_optimizer(self, create: Callable[[], Any]) -> Any:
        """Set and return `trainer.optimizer`, with groups for each learning rate; `create` is not called."""
        trainer = self.trainer
        optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        rates = [cell.learning_rate for cell in trainer.cells]
        self.blocks = build_blocks(self.pack, rates, stacked=optimizer_class in STACKABLE_OPTIMIZERS)
        trainer.optimizer = optimizer_class(self._build_groups(), **options)
        return trainer.optimizer

    def _build_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups of the present blocks, in an order that the cells alone decide."""
        trainer = self.trainer
        decayed = set(trainer.get_decay_parameter_names(self.pack.unpack_cell(0)))
        return build_parameter_groups(self.blocks, trainer.cells, decayed, trainer.args.weight_decay)

    def renew_views(self) -> None:
        """Point the optimizer's parameters to the pack's weights again, after the model was moved."""
        weights = self.pack.get_trainable_weights()
        for block in self.blocks:
            block.renew_views(weights)

    def clip_gradients(self, clip: Callable[[], Any]) -> None:
        """Do nothing and return None: `clip_and_record_norms` clips each cell."""

    def clip_and_record_norms(self, compute: Callable[[], Any]) -> Tensor:
        """Clip each cell's gradient, record the norms before, return their mean over the running cells.

        A cell whose norm is not finite fails. `compute` is not called.
        """
        trainer = self.trainer
        norms = clip_cell_gradients(trainer.model, trainer.args.max_grad_norm)
        trainer.metrics.add_grad_norms(norms)
        trainer.check_step(norms)
        self.frozen.freeze_cells(trainer.failures.keys())
        hand_over_gradients(trainer.model, self.blocks, trainer.failures.keys())
        if not trainer.failures:
            return norms.mean()
        is_running = trainer.mask_running_cells(norms.device)
        return torch.where(is_running, norms, 0).sum() / (len(norms) - len(trainer.failures))

    def save_checkpoint(self, save: Callable[[], None], run_folder: str) -> None:
        """Write each running cell's checkpoint to its own folder, then delete every cell's other steps."""
        trainer, step = self.trainer, self.trainer.state.global_step
        if not trainer.args.should_save:
            return
        for n, cell in enumerate(trainer.cells):
            if n in trainer.failures:
                continue
            path = checkpoints.build_checkpoint_path(cell.output_dir, step)
            block = next(block for block in self.blocks if n in block.cells)
            with checkpoints.create_folder_atomically(path) as folder:
                checkpoints.save_cell_checkpoint(
                    folder, self.pack.get_cell_parameters(n), block.read_cell_state(n, trainer.optimizer)
                )
                trainer.save_extra_state(n, folder)
                trainer.state.save_to_json(str(folder / "trainer_state.json"))
        for cell in trainer.cells:
            checkpoints.remove_other_checkpoints(cell.output_dir, step)

    def load_weights(self, load: Callable[[], None], checkpoint: str) -> None:
        """Load each cell's weights and extra state from its own folder of the step of `checkpoint`."""
        for n, folder in self._list_cell_checkpoints(checkpoint):
            self.pack.load_cell(n, checkpoints.load_checkpoint_weights(folder))
            self.trainer.load_extra_state(n, folder)

    def load_optimizer(self, load: Callable[[], None], checkpoint: str | None) -> None:
        """Load each cell's optimizer state from its own folder and set the schedule to the trainer's step.

        Does nothing if `checkpoint` is None.
        """
        if checkpoint is None:
            return
        trainer = self.trainer
        states = [
            checkpoints.load_optimizer_state(folder) for _, folder in self._list_cell_checkpoints(checkpoint)
        ]
        self._separate_cells(states)
        for block in self.blocks:
            block.write_state([states[n] for n in block.cells], trainer.optimizer)
        checkpoints.set_scheduler_step(trainer.lr_scheduler, trainer.optimizer, trainer.state.global_step)

    def _separate_cells(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Divide blocks whose cells have made different numbers of updates, as in packs of their own in fp16.

        states: of each cell, as `read_cell_state` returns them.
        """
        if not any(block.is_stacked for block in self.blocks):
            return
        counters = [
            tuple(sorted((key, float(value)) for key, value in entries.items() if is_number(value)))
            for entries in states
        ]
        rates = [cell.learning_rate for cell in self.trainer.cells]
        self.blocks = build_blocks(self.pack, [*zip(rates, counters, strict=True)], stacked=True)
        groups = self._build_groups()
        for group, new_group in zip(self.trainer.optimizer.param_groups, groups, strict=True):
            group["params"] = new_group["params"]

    def _list_cell_checkpoints(self, checkpoint: str) -> Iterator[tuple[int, Path]]:
        """Yield (cell number, its own checkpoint folder of the step of `checkpoint`) for every cell."""
        step = checkpoints.parse_checkpoint_step(Path(checkpoint))
        for n, cell in enumerate(self.trainer.cells):
            yield n, checkpoints.build_checkpoint_path(cell.output_dir, step)

    def convert_item_count(self, items: Tensor | None) -> Tensor | None:
        """Return the counts of all cells, (K,), unchanged."""
        return items

    def build_trl_fields(self, adapter: TaskAdapter, rows: Sequences) -> dict[str, Tensor]:
        """Return an empty dict: TRL's trainer has one student."""
        return {}

    def compute_predictions(self, adapter: TaskAdapter, model: Any, rows: Sequences) -> tuple[None, None]:
        """Return (None, None) without running the model: `compute_metrics` is for one student."""
        return None, None


def clip_cell_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip each cell's gradient to max_norm (None or 0: not at all); return the norms before, (K,).

    A gradient that is not finite stays so.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    of_parameters = [torch.linalg.vector_norm(_widen(gradient.flatten(1)), dim=1) for gradient in gradients]
    norms = torch.linalg.vector_norm(torch.stack(of_parameters), dim=0)
    if max_norm and max_norm > 0:
        scale = (max_norm / (norms + 1e-6)).clamp_max(1)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
    return norms


def _widen(values: Tensor) -> Tensor:
    """Return half-precision values in float32, others unchanged."""
    return values.float() if values.dtype in HALF_DTYPES else values
