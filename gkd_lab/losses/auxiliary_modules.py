"""Auxiliary modules of a pack: one for each cell and `AuxiliaryLoss`, their optimizers and checkpoints.

Shapes: K cells, B rows a cell, C completion tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss, AuxiliaryModule, LossInputs, ModelOutputs
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.step_loss import MicroBatch, split_blocks
from gkd_lab.losses.terms import required_outputs, term_names
from gkd_lab.losses.uld import TextReader, ULDModule
from gkd_lab.models.heads import UnprojectedOutput

CHECKPOINT_STEM = "step_modules"


@dataclass
class _TermModule:
    """The module of a term, and the optimizer of its parameters if it has any."""

    name: str
    module: AuxiliaryModule
    optimizer: torch.optim.Optimizer | None = field(init=False)

    def __post_init__(self) -> None:
        parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0) if parameters else None

    @property
    def has_parameter_loss(self) -> bool:
        """Whether the module's class overrides `parameter_loss`: its parameters learn a separate loss."""
        return type(self.module).parameter_loss is not AuxiliaryModule.parameter_loss


class AuxiliaryModules:
    """The auxiliary modules of all cells, by cell and number of the term in the cell's list.

    Args:
        cells: K cells.
        student, teacher: The configurations of the models.
        device, dtype: Of the modules; dtype float32, or float64 for a student in float64.
        average_over_ranks: Mean of a tensor over processes.
    """

    def __init__(
        self,
        cells: Sequence[CellArguments],
        student: PretrainedConfig,
        teacher: PretrainedConfig | None,
        device: torch.device,
        dtype: torch.dtype,
        average_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.cells, self._student, self._teacher = cells, student, teacher
        self._average_over_ranks = average_over_ranks
        wide = torch.promote_types(dtype, torch.float32)
        self._term_modules: dict[tuple[int, int], _TermModule] = {}
        for n, cell in enumerate(cells):
            terms = cell.list_terms()
            for number, (name, term) in enumerate(zip(term_names(terms), terms, strict=True)):
                if isinstance(term.loss, AuxiliaryLoss):
                    module = term.loss.create_module(student, teacher, cell.seed).to(device, wide)
                    self._term_modules[n, number] = _TermModule(name, module)
        self.required_outputs = required_outputs(cell.list_terms() for cell in cells)
        self.reads_teacher = any(loss.reads_teacher for loss in self._auxiliary_losses())

    def _auxiliary_losses(self) -> list[AuxiliaryLoss]:
        """Return the auxiliary losses among the terms of all cells, cell after cell, repeats included."""
        losses = [term.loss for cell in self.cells for term in cell.list_terms()]
        return [loss for loss in losses if isinstance(loss, AuxiliaryLoss)]

    def set_text_reader(self, teacher: TextReader) -> None:
        """Set the teacher that the ULD modules read texts with; other modules are left alone."""
        for term_module in self._term_modules.values():
            if isinstance(term_module.module, ULDModule):
                term_module.module.teacher = teacher

    def __bool__(self) -> bool:
        return bool(self._term_modules)

    @property
    def has_parameters(self) -> bool:
        """Whether any cell's module has parameters to train."""
        return any(term_module.optimizer is not None for term_module in self._term_modules.values())

    def compute_terms(
        self,
        student: UnprojectedOutput,
        teacher: UnprojectedOutput | None,
        batch: MicroBatch,
        weights: Tensor,
    ) -> dict[tuple[int, int], Tensor]:
        """Return (cell, term number) -> weight * value, (); backpropagate separate parameter losses.

        Values are the terms' parts of their cells' losses, differentiable by the student.

        student: of (K*B) rows; teacher: of the teacher's rows; weights: (K, B, C).
        """
        values = {}
        with torch.autocast(student.hidden.device.type, enabled=False):
            for (n, number), term_module in self._term_modules.items():
                weight = batch.cell_terms(n, self.cells[n])[number].weight
                inputs = self._build_inputs(n, student, teacher, batch, weights)
                learning = batch.only_term is None
                values[n, number] = weight * _compute_term(term_module, inputs, learning=learning)
        return values

    def _build_inputs(
        self,
        n: int,
        student: UnprojectedOutput,
        teacher: UnprojectedOutput | None,
        batch: MicroBatch,
        weights: Tensor,
    ) -> LossInputs:
        """Return cell `n`'s part of a micro-batch: rows, token weights, and both models' outputs."""
        count, block = len(self.cells), batch.block_of_cell[n]
        teacher_outputs = None
        if teacher is not None and self._teacher is not None:
            teacher_outputs = _select_block(teacher, len(batch.prompts_of_block), block, self._teacher)
        return LossInputs(
            rows=split_blocks(batch.student, count)[n],
            student=_select_block(student, count, n, self._student),
            teacher=teacher_outputs,
            weights=weights[n],
            on_policy=batch.on_policy[n],
            step=batch.step,
            seed=self.cells[n].seed,
        )

    def update_modules(self, rates: Mapping[int, float], factor: float, max_norm: float) -> None:
        """Step the optimizers of the cells in `rates` on rank-averaged gradients; clear all gradients.

        rates: cell -> base learning rate, for modules that have none of their own. factor: of the schedule.
        max_norm: each module's gradient is clipped to it; 0: no clipping.
        """
        for (n, _), term_module in self._term_modules.items():
            parameters = [p for p in term_module.module.parameters() if p.grad is not None]
            if term_module.optimizer is not None and n in rates:
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad = self._average_over_ranks(parameter.grad)
                if max_norm > 0 and parameters:
                    nn.utils.clip_grad_norm_(parameters, max_norm)
                for group in term_module.optimizer.param_groups:
                    group["lr"] = factor * (term_module.module.learning_rate or rates[n])
                term_module.optimizer.step()
            term_module.module.zero_grad()

    def collect_logs(self, n: int) -> dict[str, float]:
        """Return `TERM/KEY` -> value of cell `n`, such as `adversarial/accuracy_student`; reset them."""
        return {
            f"{term_module.name}/{key}": value
            for term_module in self._cell_modules(n).values()
            for key, value in term_module.module.collect_logs(self._average_over_ranks).items()
        }

    def save_cell(self, n: int, folder: Path) -> None:
        """Write weights and optimizer states of cell `n`'s modules to a file in `folder`, if any exist."""
        tensors: dict[str, Tensor] = {}
        for number, term_module in self._cell_modules(n).items():
            tensors |= {f"{number}:{name}": t for name, t in term_module.module.state_dict().items()}
            if term_module.optimizer is not None:
                for parameter, state in term_module.optimizer.state_dict()["state"].items():
                    tensors |= {f"{number}:optimizer:{parameter}:{entry}": t for entry, t in state.items()}
        if tensors:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, folder / f"{CHECKPOINT_STEM}.safetensors")

    def load_cell(self, n: int, folder: Path) -> None:
        """Load what `save_cell` wrote for cell `n`; ValueError if modules have a state but no file exists."""
        if not any(term_module.module.state_dict() for term_module in self._cell_modules(n).values()):
            return
        file = folder / f"{CHECKPOINT_STEM}.safetensors"
        if not file.exists():
            raise ValueError(f"{folder} has no {file.name}, from which this loss's terms go on: start anew")
        tensors = load_file(file)
        for number, term_module in self._cell_modules(n).items():
            state = {k.partition(":")[2]: t for k, t in tensors.items() if k.startswith(f"{number}:")}
            term_module.module.load_state_dict(
                {k: t for k, t in state.items() if not k.startswith("optimizer:")}
            )
            if term_module.optimizer is not None:
                term_module.optimizer.load_state_dict(_optimizer_state(term_module.optimizer, state))

    def _cell_modules(self, n: int) -> dict[int, _TermModule]:
        """Return term number -> module and its optimizer, of cell `n` alone."""
        return {
            number: term_module for (cell, number), term_module in self._term_modules.items() if cell == n
        }


def _compute_term(term_module: _TermModule, inputs: LossInputs, *, learning: bool) -> Tensor:
    """Return a term's value, (), unweighted; if `learning`, first backpropagate its separate loss, if any.

    Nothing is backpropagated where gradients are off. The value gives a module with such a loss no gradient.
    """
    if not term_module.has_parameter_loss:
        return term_module.module(inputs)
    if learning and torch.is_grad_enabled():
        loss = term_module.module.parameter_loss(inputs)
        if loss is not None:
            loss.backward()
    term_module.module.requires_grad_(False)
    try:
        value: Tensor = term_module.module(inputs)
    finally:
        term_module.module.requires_grad_(True)
    return value


def _select_block(outputs: UnprojectedOutput, blocks: int, n: int, config: PretrainedConfig) -> ModelOutputs:
    """Return block `n` of a model's output rows, of `blocks` equal ones, with cell `n`'s head of a pack."""

    def select_rows(tensor: Tensor) -> Tensor:
        """Return the rows of block `n` of one tensor."""
        rows = len(tensor) // blocks
        return tensor[n * rows : (n + 1) * rows]

    extra = {name: tuple(map(select_rows, tensors)) for name, tensors in outputs.extra_outputs.items()}
    return ModelOutputs(select_rows(outputs.hidden), extra, config, outputs.projection.select_cell(n))


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a state dict to load: states from tensors `optimizer:NUMBER:ENTRY`, groups of this optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer:"):
            _, number, entry = name.split(":", 2)
            state.setdefault(int(number), {})[entry] = tensor
    return {**optimizer.state_dict(), "state": state}
