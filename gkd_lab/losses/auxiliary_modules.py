"""The modules that compute a step's `AuxiliaryLoss` terms: one for each cell and term, and what they learn.

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
    """A term's module, and the optimizer of its parameters where it has any."""

    name: str
    module: AuxiliaryModule
    optimizer: torch.optim.Optimizer | None = field(init=False)

    def __post_init__(self) -> None:
        parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0) if parameters else None

    @property
    def has_parameter_loss(self) -> bool:
        """Whether its parameters have a loss of their own."""
        return type(self.module).parameter_loss is not AuxiliaryModule.parameter_loss


class AuxiliaryModules:
    """All of them, by cell and number of the term in the cell's list.

    Args:
        cells: K.
        student, teacher: The configurations of the models.
        device, dtype: Where modules compute, and in what: float32, or float64 for a student in float64.
        over_ranks: Mean of a tensor over processes.
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
            called = term_names(cell.list_terms())
            for place, term in enumerate(cell.list_terms()):
                if isinstance(term.loss, AuxiliaryLoss):
                    module = term.loss.create_module(student, teacher, cell.seed).to(device, wide)
                    self._term_modules[n, place] = _TermModule(called[place], module)
        self.required_outputs = required_outputs(cell.list_terms() for cell in cells)
        self.reads_teacher = any(measure.reads_teacher for measure in self._auxiliary_losses())

    def _auxiliary_losses(self) -> list[AuxiliaryLoss]:
        terms = [term.loss for cell in self.cells for term in cell.list_terms()]
        return [measure for measure in terms if isinstance(measure, AuxiliaryLoss)]

    def set_text_reader(self, teacher: TextReader) -> None:
        """Tell the terms that read texts who reads them."""
        for own in self._term_modules.values():
            if isinstance(own.module, ULDModule):
                own.module.teacher = teacher

    def __bool__(self) -> bool:
        return bool(self._term_modules)

    @property
    def has_parameters(self) -> bool:
        """Whether any of them has parameters."""
        return any(own.optimizer is not None for own in self._term_modules.values())

    # ---- values ----

    def compute_terms(
        self,
        student: UnprojectedOutput,
        teacher: UnprojectedOutput | None,
        batch: MicroBatch,
        weights: Tensor,
    ) -> dict[tuple[int, int], Tensor]:
        """What each term adds to its cell's loss, (), differentiable by the student.

        student: of (K*B) rows; teacher: of the teacher's rows; weights: (K, B, C).
        """
        found = {}
        with torch.autocast(student.hidden.device.type, enabled=False):
            for (n, place), own in self._term_modules.items():
                term = batch.cell_terms(n, self.cells[n])[place]
                seen = self._build_inputs(n, student, teacher, batch, weights)
                found[n, place] = term.weight * _compute_term(own, seen, learning=batch.only_term is None)
        return found

    def _build_inputs(
        self,
        n: int,
        student: UnprojectedOutput,
        teacher: UnprojectedOutput | None,
        batch: MicroBatch,
        weights: Tensor,
    ) -> LossInputs:
        count, block = len(self.cells), batch.block_of_cell[n]
        of_teacher = None
        if teacher is not None and self._teacher is not None:
            of_teacher = _select_block(teacher, len(batch.prompts_of_block), block, self._teacher)
        return LossInputs(
            rows=split_blocks(batch.student, count)[n],
            student=_select_block(student, count, n, self._student),
            teacher=of_teacher,
            weights=weights[n],
            on_policy=batch.on_policy[n],
            step=batch.step,
            seed=self.cells[n].seed,
        )

    # ---- what they learn ----

    def update_modules(self, rates: Mapping[int, float], factor: float, max_norm: float) -> None:
        """One update of the modules of the cells in `rates`, which has each one's base learning rate.

        factor: of the schedule. max_norm: a gradient is clipped to it, each module's by itself; 0: not.
        """
        for (n, _), own in self._term_modules.items():
            parameters = [p for p in own.module.parameters() if p.grad is not None]
            if own.optimizer is not None and n in rates:
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad = self._average_over_ranks(parameter.grad)
                if max_norm > 0 and parameters:
                    nn.utils.clip_grad_norm_(parameters, max_norm)
                for group in own.optimizer.param_groups:
                    group["lr"] = factor * (own.module.learning_rate or rates[n])
                own.optimizer.step()
            own.module.zero_grad()

    def collect_logs(self, n: int) -> dict[str, float]:
        """What the modules of a cell have to say of the last step, under `name/what`."""
        return {
            f"{own.name}/{what}": value
            for (cell, _), own in self._term_modules.items()
            if cell == n
            for what, value in own.module.collect_logs(self._average_over_ranks).items()
        }

    # ---- in a cell's checkpoints ----

    def save_cell(self, n: int, folder: Path) -> None:
        """The cell's modules and their optimizers."""
        tensors: dict[str, Tensor] = {}
        for place, own in self._cell_modules(n).items():
            tensors |= {f"{place}:{name}": t for name, t in own.module.state_dict().items()}
            if own.optimizer is not None:
                for number, state in own.optimizer.state_dict()["state"].items():
                    tensors |= {f"{place}:optimizer:{number}:{entry}": t for entry, t in state.items()}
        if tensors:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(kept, folder / f"{CHECKPOINT_STEM}.safetensors")

    def load_cell(self, n: int, folder: Path) -> None:
        """Raises ValueError for a checkpoint that was saved without them."""
        if not any(own.module.state_dict() for own in self._cell_modules(n).values()):
            return
        place_of = folder / f"{CHECKPOINT_STEM}.safetensors"
        if not place_of.exists():
            raise ValueError(
                f"{folder} has no {place_of.name}, which this loss's terms go on from: start anew"
            )
        kept = load_file(place_of)
        for place, own in self._cell_modules(n).items():
            mine = {k.partition(":")[2]: t for k, t in kept.items() if k.startswith(f"{place}:")}
            own.module.load_state_dict({k: t for k, t in mine.items() if not k.startswith("optimizer:")})
            if own.optimizer is not None:
                own.optimizer.load_state_dict(_optimizer_state(own.optimizer, mine))

    def _cell_modules(self, n: int) -> dict[int, _TermModule]:
        return {place: own for (cell, place), own in self._term_modules.items() if cell == n}


def _compute_term(term_module: _TermModule, inputs: LossInputs, *, learning: bool) -> Tensor:
    """The term's value; a module with a loss of its own gets its gradient here, and none from the value."""
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


def _select_block(read: UnprojectedOutput, blocks: int, n: int, config: PretrainedConfig) -> ModelOutputs:
    """Block `n` of a pass over `parts` blocks of rows."""

    def block(tensor: Tensor) -> Tensor:
        rows = len(tensor) // blocks
        return tensor[n * rows : (n + 1) * rows]

    outputs = {name: tuple(map(block, tensors)) for name, tensors in read.extra_outputs.items()}
    return ModelOutputs(block(read.hidden), outputs, config, read.projection.select_cell(n))


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer:"):
            _, number, entry = name.split(":", 2)
            state.setdefault(int(number), {})[entry] = tensor
    return {**optimizer.state_dict(), "state": state}
