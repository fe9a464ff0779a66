"""Who says what a student is compared with: a model that reads each step's rows, or anything that knows them.

Shapes: M blocks of B rows, C completion tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel
from trl.models.utils import _ForwardRedirection

from gkd_lab.losses.step_loss import MicroBatch, project_blocks
from gkd_lab.losses.teacher_targets import TeacherLogits
from gkd_lab.losses.terms import WeightedLosses
from gkd_lab.models.heads import OutputHead, UnprojectedOutput
from gkd_lab.models.loading import load_teacher, use_on_device
from gkd_lab.models.sharding import place_teacher
from gkd_lab.teachers.shared_prefix import SharedPrefixReader


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher makes of a step's rows.

    guide: its distributions for M blocks of B * C tokens.
    states: its whole forward pass, where it has one and was asked.
    """

    logits: TeacherLogits
    forward_output: UnprojectedOutput | None = None


class TeacherInterface(Protocol):
    """One teacher of a run."""

    config: PretrainedConfig | None
    """Of its model; None: there is none here."""

    def activate(self) -> AbstractContextManager[Any]:
        """Its weights are on the device within."""
        ...

    def activate_head(self) -> AbstractContextManager[Any]:
        """Its head is on the device within, which a guide reads after `says`."""
        ...

    def compute_output(self, batch: MicroBatch, output_names: Sequence[str] = ()) -> TeacherOutput:
        """Of the step's rows, without gradient; `asks` what its pass is to record."""
        ...


@dataclass(frozen=True)
class Teacher:
    """A teacher besides the first.

    model: The model, which is frozen and cast in place, or its name.
    dtype: Of its weights, such as "bfloat16"; None leaves them as they are.
    parked: Keep it on the CPU between its uses; None: as `GKDConfig.park_teacher` says of the first.
    processing_class: Its tokenizer, where it is not in its folder; it must be the student's.
    """

    model: PreTrainedModel | str
    dtype: str | None = None
    parked: bool | None = None
    processing_class: Any = None

    def load_model(self, student: PreTrainedModel, *, trust_remote_code: bool) -> PreTrainedModel:
        """The frozen model. Raises ValueError for one that does not read what the student reads."""
        return load_teacher(
            self.model,
            name_or_path=None,
            init_kwargs=None,
            student=student,
            dtype=self.dtype,
            trust_remote_code=trust_remote_code,
        )


class LiveTeacher:
    """A frozen model, copied to the device, sharded, or parked on the CPU between uses."""

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, *, parked: bool) -> None:
        self.head = OutputHead(model)
        self.read_batch = SharedPrefixReader(self.head)
        self.model = place_teacher(model, accelerator, parked=parked)
        self.config: PretrainedConfig | None = model.config
        self.parked, self._accelerator = parked, accelerator

    def activate(self) -> AbstractContextManager[Any]:
        return use_on_device(self.model, self._accelerator.device, parked=self.parked)

    def activate_head(self) -> AbstractContextManager[Any]:
        head = self.head.model.get_output_embeddings()
        if head is None:
            return nullcontext()
        return use_on_device(head, self._accelerator.device, parked=self.parked)

    def compute_output(self, batch: MicroBatch, output_names: Sequence[str] = ()) -> TeacherOutput:
        with torch.no_grad(), self._accelerator.autocast():
            states: UnprojectedOutput = run_inside_forward(
                self.model, self.head.model, self._run_forward_pass, (batch, output_names)
            )
        return TeacherOutput(project_blocks(states, len(batch.prompts_of_block)), states)

    def _run_forward_pass(self, asked: tuple[MicroBatch, Sequence[str]]) -> UnprojectedOutput:
        batch, asks = asked
        # Prompts that are read once leave no states of their own.
        return self.head.compute_unprojected(batch.teacher, asks) if asks else self.read_batch(batch)

    @property
    def is_sharded(self) -> bool:
        """Whether its weights are at hand only within its own forward pass."""
        return isinstance(self.model, FSDPModule) or self.model is not self.head.model


def check_teacher_numbers(teachers: Sequence[TeacherInterface], used_numbers: Sequence[int]) -> None:
    """Raises ValueError if the loss reads a teacher that is not there, or several of which one is sharded."""
    there = len(teachers)
    if used_numbers and used_numbers[-1] >= there:
        numbers = "number 0 alone" if there == 1 else f"numbers 0 to {there - 1}"
        raise ValueError(
            f"objectives: a divergence compares with teacher number {used_numbers[-1]}, and there is {numbers}: give "
            "it in `more_teachers`"
        )
    if there > 1 and any(isinstance(one, LiveTeacher) and one.is_sharded for one in teachers):
        raise ValueError(
            f"{there} teachers cannot be sharded by FSDP or DeepSpeed: keep them whole, and `parked` if they "
            "do not fit at once"
        )


def check_row_routes(all_terms: Iterable[WeightedLosses], routes: Tensor | None) -> None:
    """Raises ValueError for rows that are meant for none of the teachers of a routed divergence.

    routes: (N, 1), each row's teacher; None: no row names one.
    """
    for target in {term.target for terms in all_terms for term in terms if term.target.routed}:
        named = [] if routes is None else sorted(set(routes.flatten().tolist()))
        if not named or not set(named) <= set(target.teachers):
            said = "none" if not named or -1 in named else f"number {max(named)}"
            raise ValueError(
                f"a divergence is routed to the teachers {target.teachers}, and a row names {said}: give "
                "each row a column `teacher` with the number of one of them"
            )


def run_inside_forward(
    wrapped: nn.Module, inner: nn.Module, method: Callable[..., Any], argument: Any
) -> Any:
    """Run `method` within the forward pass of `wrapped`, where DDP and FSDP have the weights at hand."""
    if wrapped is inner and not isinstance(inner, FSDPModule):
        return method(argument)
    return _ForwardRedirection()(wrapped, inner, method, argument)
