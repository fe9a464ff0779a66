"""Update and save students: a single model by transformers' Trainer, a pack cell by cell.

A pack's optimizer sees each cell's weights as parameters of their own, views with the shapes of a plain
model, so that an optimizer whose step depends on a tensor's shape (Adafactor) does what it would do alone.
Shapes: K cells.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.forward import Sequences
from gkd_lab.models.packing import Pack
from gkd_lab.models.projection import HALF_DTYPES
from gkd_lab.training import checkpoints
from gkd_lab.training.adapters import TaskAdapter
from gkd_lab.training.callbacks import ParameterViewsCallback

if TYPE_CHECKING:
    from gkd_lab.training.pack_trainer import PackTrainer

CellParameters = list[dict[str, nn.Parameter]]
"""For each cell name -> parameter, in the shape of a plain model."""


class StudentStrategy:
    """Updates and saves one plain model as the Trainer does.

    A method gets the Trainer's own method to call or to replace.
    """

    def __init__(self, trainer: "PackTrainer") -> None:
        self.trainer = trainer
        self.cell_parameters: CellParameters = []

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
    """Updates and saves K students in one model: optimizer groups, clipping and checkpoints per cell."""

    def __init__(self, trainer: "PackTrainer") -> None:
        super().__init__(trainer)
        self.pack = trainer.pack

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
        """Set and return `trainer.optimizer`, with parameter groups for each cell; `create` is not called.

        Creates the parameter views, whose shapes are those of a plain model.
        """
        trainer, args = self.trainer, self.trainer.args
        self.cell_parameters = create_parameter_views(self.pack)
        decayed = set(trainer.get_decay_parameter_names(self.pack.unpack_cell(0)))
        optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        groups = build_parameter_groups(self.cell_parameters, trainer.cells, decayed, args.weight_decay)
        trainer.optimizer = optimizer_class(groups, **options)
        return trainer.optimizer

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
        hand_over_gradients(trainer.model, self.cell_parameters, trainer.failures.keys())
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
            with checkpoints.create_folder_atomically(path) as folder:
                checkpoints.save_cell_checkpoint(
                    folder, self.pack.get_cell_parameters(n), self.cell_parameters[n], trainer.optimizer
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
        for n, folder in self._list_cell_checkpoints(checkpoint):
            checkpoints.load_optimizer_state(folder, self.cell_parameters[n], trainer.optimizer)
        checkpoints.set_scheduler_step(trainer.lr_scheduler, trainer.optimizer, trainer.state.global_step)

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


def create_parameter_views(pack: Pack) -> CellParameters:
    """Return a dict name -> parameter for each cell: views of its slice of the pack's trainable weights."""
    return [
        {name: nn.Parameter(view) for name, view in pack.get_cell_parameters(n).items()}
        for n in range(pack.size)
    ]


def build_parameter_groups(
    cell_parameters: CellParameters,
    cells: Sequence[CellArguments],
    decayed: Collection[str],
    weight_decay: float,
) -> list[dict[str, object]]:
    """Build up to two optimizer groups per learning rate: decayed weights, and others without decay.

    A group is updated at once, so that cells of one rate cost no more launches than a single one.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for cell, named_parameters in zip(cells, cell_parameters, strict=True):
        for name, parameter in named_parameters.items():
            groups.setdefault((cell.learning_rate, name in decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if is_decayed else 0.0}
        for (rate, is_decayed), parameters in groups.items()
    ]


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


def hand_over_gradients(model: nn.Module, cell_parameters: CellParameters, failed: Collection[int]) -> None:
    """Give each cell's views their slice of the pack's gradient; those of failed cells get None.

    Their weights stay then.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for n, (parameters, gradient) in enumerate(zip(cell_parameters, parameter.grad, strict=True)):
                parameters[name].grad = None if n in failed else gradient
