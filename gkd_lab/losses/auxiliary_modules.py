"""The modules that compute a step's `StepMeasure` terms: one for each cell and term, and what they learn.

Shapes: K cells, B rows a cell, C completion tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, TrainerCallback

from gkd_lab.losses.auxiliary_losses import Pass, Seen, StepMeasure, StepModule
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.step_loss import StepBatch, blocks
from gkd_lab.losses.terms import asked_for, names
from gkd_lab.losses.uld import TextReader, UldModule
from gkd_lab.models.heads import Unprojected

FILE = "step_modules"


@dataclass
class _Own:
    """A term's module, and the optimizer of its parameters where it has any."""

    name: str
    module: StepModule
    optimizer: torch.optim.Optimizer | None = field(init=False)

    def __post_init__(self) -> None:
        parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0) if parameters else None

    @property
    def learns_apart(self) -> bool:
        """Whether its parameters have a loss of their own."""
        return type(self.module).own_loss is not StepModule.own_loss


class StepModules:
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
        over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.cells, self._student, self._teacher = cells, student, teacher
        self._over_ranks = over_ranks
        wide = torch.promote_types(dtype, torch.float32)
        self._own: dict[tuple[int, int], _Own] = {}
        for n, cell in enumerate(cells):
            called = names(cell.terms())
            for place, term in enumerate(cell.terms()):
                if isinstance(term.measure, StepMeasure):
                    module = term.measure.module(student, teacher, cell.seed).to(device, wide)
                    self._own[n, place] = _Own(called[place], module)
        self.asks = asked_for(cell.terms() for cell in cells)
        self.reads_teacher = any(measure.reads_teacher for measure in self._measures())

    def _measures(self) -> list[StepMeasure]:
        terms = [term.measure for cell in self.cells for term in cell.terms()]
        return [measure for measure in terms if isinstance(measure, StepMeasure)]

    def read_texts_with(self, teacher: TextReader) -> None:
        """Tell the terms that read texts who reads them."""
        for own in self._own.values():
            if isinstance(own.module, UldModule):
                own.module.teacher = teacher

    def __bool__(self) -> bool:
        return bool(self._own)

    @property
    def learn(self) -> bool:
        """Whether any of them has parameters."""
        return any(own.optimizer is not None for own in self._own.values())

    # ---- values ----

    def values(
        self, student: Unprojected, teacher: Unprojected | None, batch: StepBatch, weights: Tensor
    ) -> dict[tuple[int, int], Tensor]:
        """What each term adds to its cell's loss, (), differentiable by the student.

        student: of (K*B) rows; teacher: of the teacher's rows; weights: (K, B, C).
        """
        found = {}
        with torch.autocast(student.hidden.device.type, enabled=False):
            for (n, place), own in self._own.items():
                term = batch.terms(n, self.cells[n])[place]
                seen = self._seen(n, student, teacher, batch, weights)
                found[n, place] = term.weight * _value(own, seen, learning=batch.only is None)
        return found

    def _seen(
        self,
        n: int,
        student: Unprojected,
        teacher: Unprojected | None,
        batch: StepBatch,
        weights: Tensor,
    ) -> Seen:
        count, block = len(self.cells), batch.block_of_cell[n]
        of_teacher = None
        if teacher is not None and self._teacher is not None:
            of_teacher = _pass(teacher, len(batch.prompts_of_block), block, self._teacher)
        return Seen(
            rows=blocks(batch.student, count)[n],
            student=_pass(student, count, n, self._student),
            teacher=of_teacher,
            weights=weights[n],
            on_policy=batch.on_policy[n],
            step=batch.step,
            seed=self.cells[n].seed,
        )

    # ---- what they learn ----

    def step(self, rates: Mapping[int, float], factor: float, max_norm: float) -> None:
        """One update of the modules of the cells in `rates`, which has each one's base learning rate.

        factor: of the schedule. max_norm: a gradient is clipped to it, each module's by itself; 0: not.
        """
        for (n, _), own in self._own.items():
            parameters = [p for p in own.module.parameters() if p.grad is not None]
            if own.optimizer is not None and n in rates:
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad = self._over_ranks(parameter.grad)
                if max_norm > 0 and parameters:
                    nn.utils.clip_grad_norm_(parameters, max_norm)
                for group in own.optimizer.param_groups:
                    group["lr"] = factor * (own.module.learning_rate or rates[n])
                own.optimizer.step()
            own.module.zero_grad()

    def logged(self, n: int) -> dict[str, float]:
        """What the modules of a cell have to say of the last step, under `name/what`."""
        return {
            f"{own.name}/{what}": value
            for (cell, _), own in self._own.items()
            if cell == n
            for what, value in own.module.logged(self._over_ranks).items()
        }

    # ---- in a cell's checkpoints ----

    def save(self, n: int, folder: Path) -> None:
        """The cell's modules and their optimizers."""
        tensors: dict[str, Tensor] = {}
        for place, own in self._of(n).items():
            tensors |= {f"{place}:{name}": t for name, t in own.module.state_dict().items()}
            if own.optimizer is not None:
                for number, state in own.optimizer.state_dict()["state"].items():
                    tensors |= {f"{place}:optimizer:{number}:{entry}": t for entry, t in state.items()}
        if tensors:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(kept, folder / f"{FILE}.safetensors")

    def load(self, n: int, folder: Path) -> None:
        """Raises ValueError for a checkpoint that was saved without them."""
        if not any(own.module.state_dict() for own in self._of(n).values()):
            return
        place_of = folder / f"{FILE}.safetensors"
        if not place_of.exists():
            raise ValueError(
                f"{folder} has no {place_of.name}, which this loss's terms go on from: start anew"
            )
        kept = load_file(place_of)
        for place, own in self._of(n).items():
            mine = {k.partition(":")[2]: t for k, t in kept.items() if k.startswith(f"{place}:")}
            own.module.load_state_dict({k: t for k, t in mine.items() if not k.startswith("optimizer:")})
            if own.optimizer is not None:
                own.optimizer.load_state_dict(_state(own.optimizer, mine))

    def _of(self, n: int) -> dict[int, _Own]:
        return {place: own for (cell, place), own in self._own.items() if cell == n}


class StepOwn(TrainerCallback):
    """Lets the modules learn after each step of the students, at the same point of the schedule."""

    def __init__(self, modules: StepModules, failures: Mapping[int, str]) -> None:
        self.modules, self.failures = modules, failures

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        cells = self.modules.cells
        rates = {n: cell.learning_rate for n, cell in enumerate(cells) if n not in self.failures}
        factor = _factor(given["lr_scheduler"], given["optimizer"], cells[0].learning_rate)
        self.modules.step(rates, factor, args.max_grad_norm or 0.0)


def _factor(schedule: Any, optimizer: Any, base: float) -> float:
    """Where a schedule stands; one that is no function of the step, as on a plateau, shows in the rate."""
    if hasattr(schedule, "lr_lambdas"):
        return float(schedule.lr_lambdas[0](schedule.last_epoch))
    return float(optimizer.param_groups[0]["lr"]) / (base or 1)


def _value(own: _Own, seen: Seen, *, learning: bool) -> Tensor:
    """The term's value; a module with a loss of its own gets its gradient here, and none from the value."""
    if not own.learns_apart:
        return own.module(seen)
    if learning and torch.is_grad_enabled():
        loss = own.module.own_loss(seen)
        if loss is not None:
            loss.backward()
    own.module.requires_grad_(False)
    try:
        value: Tensor = own.module(seen)
    finally:
        own.module.requires_grad_(True)
    return value


def _pass(read: Unprojected, parts: int, n: int, config: PretrainedConfig) -> Pass:
    """Block `n` of a pass over `parts` blocks of rows."""

    def block(tensor: Tensor) -> Tensor:
        rows = len(tensor) // parts
        return tensor[n * rows : (n + 1) * rows]

    outputs = {name: tuple(map(block, tensors)) for name, tensors in read.outputs.items()}
    return Pass(block(read.hidden), outputs, config, read.projection.of_cell(n))


def _state(optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in kept.items():
        if name.startswith("optimizer:"):
            _, number, entry = name.split(":", 2)
            state.setdefault(int(number), {})[entry] = tensor
    return {**optimizer.state_dict(), "state": state}
