"""Teacher interface, and the teacher that is a live model of this process.

Shapes: M blocks of B rows, C completion tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel
from trl.models.utils import _ForwardRedirection

from gkd_lab.losses.step_loss import MicroBatch, build_teacher_logits
from gkd_lab.losses.teacher_targets import TeacherLogits
from gkd_lab.losses.terms import WeightedLosses
from gkd_lab.models.heads import OutputHead, UnprojectedOutput
from gkd_lab.models.loading import load_teacher, use_on_device
from gkd_lab.models.padding import declare_counts
from gkd_lab.models.sharding import place_teacher
from gkd_lab.teachers.shared_prefix import SharedPrefixReader


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's output for the rows of a micro-batch.

    logits: its distributions for M blocks of B * C tokens.
    forward_output: its whole forward pass, if it is a model and hidden states or attention maps were
    requested.
    """

    logits: TeacherLogits
    forward_output: UnprojectedOutput | None = None


class TeacherInterface(Protocol):
    """One teacher of a run: a live model, cached logits or a server."""

    config: PretrainedConfig | None
    """Configuration of its model; None: the teacher is no model of this process."""

    def activate(self) -> AbstractContextManager[Any]:
        """Return a context within which the teacher's weights are on the device."""
        ...

    def activate_head(self) -> AbstractContextManager[Any]:
        """Return a context that keeps the head on the device: lazy logits read it after `compute_output`."""
        ...

    def compute_output(self, batch: MicroBatch, output_names: Sequence[str] = ()) -> TeacherOutput:
        """Return the teacher's logits for a micro-batch, and any extra outputs named, without gradient."""
        ...


@dataclass(frozen=True)
class Teacher:
    """A teacher besides the first.

    Args:
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
        """Return the model, loaded if it is a name, frozen and cast to `dtype`.

        Raises ValueError if it is of another family than the student.
        """
        return load_teacher(
            self.model,
            name_or_path=None,
            init_kwargs=None,
            student=student,
            dtype=self.dtype,
            trust_remote_code=trust_remote_code,
        )


class LiveTeacher:
    """A frozen model, copied to the device, sharded, or parked on the CPU between uses.

    use_alone: Returns the context of each run of the model, for one that shares its weights with a student.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        accelerator: Accelerator,
        *,
        parked: bool,
        use_alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.use_alone = use_alone
        with use_alone():
            self.head = OutputHead(model)
            self.prefix_reader = SharedPrefixReader(self.head)
        self.model = place_teacher(model, accelerator, parked=parked)
        self.config: PretrainedConfig | None = model.config
        self.parked, self.accelerator = parked, accelerator

    def activate(self) -> AbstractContextManager[Any]:
        """Return a context within which the model is on the device; a parked one is copied there."""
        return use_on_device(self.model, self.accelerator.device, parked=self.parked)

    def activate_head(self) -> AbstractContextManager[Any]:
        """Return a context within which the output head alone is on the device, if the model has one."""
        head = self.head.model.get_output_embeddings()
        if head is None:
            return nullcontext()
        return use_on_device(head, self.accelerator.device, parked=self.parked)

    def compute_output(self, batch: MicroBatch, output_names: Sequence[str] = ()) -> TeacherOutput:
        """Run the model on the teacher rows without gradient; return lazy logits and the forward output."""
        with self.use_alone(), torch.no_grad(), self.accelerator.autocast():
            output: UnprojectedOutput = run_inside_forward(
                self.model, self.head.model, self._run_forward_pass, (batch, output_names)
            )
        return TeacherOutput(build_teacher_logits(output, len(batch.prompts_of_block)), output)

    def _run_forward_pass(self, inputs: tuple[MicroBatch, Sequence[str]]) -> UnprojectedOutput:
        """Return hidden states and head for (micro-batch, extra output names), prompts shared if no extras.

        With extra outputs each row is read whole; without, a prompt that rows share is read once.
        """
        batch, output_names = inputs
        # Prompts that are read once leave no states of their own.
        if output_names:
            with declare_counts(self.head.model, batch.teacher, batch.teacher.token_counts):
                return self.head.compute_unprojected(batch.teacher, output_names)
        return self.prefix_reader(batch)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are available only within the model's own forward pass."""
        return isinstance(self.model, FSDPModule) or self.model is not self.head.model


@contextmanager
def compute_teacher_outputs(
    teachers: Sequence[TeacherInterface],
    numbers: Sequence[int],
    batch: MicroBatch,
    first_output_names: Sequence[str],
) -> Iterator[Mapping[int, TeacherOutput]]:
    """Run the teachers of these numbers on a micro-batch; yield number -> output, valid within the context.

    Within the context the weights that the loss still reads stay on the device: all of a single teacher, the
    heads of several. Several teachers come to the device one after another. `first_output_names`: extra
    outputs that teacher 0 records.
    """
    names = {number: first_output_names if number == 0 else () for number in numbers}
    with ExitStack() as active:
        if len(numbers) == 1:
            active.enter_context(teachers[numbers[0]].activate())
            yield {number: teachers[number].compute_output(batch, names[number]) for number in numbers}
            return
        outputs = {}
        for number in numbers:
            with teachers[number].activate():
                outputs[number] = teachers[number].compute_output(batch, names[number])
        for number in numbers:
            active.enter_context(teachers[number].activate_head())
        yield outputs


def check_teacher_numbers(teachers: Sequence[TeacherInterface], used_numbers: Sequence[int]) -> None:
    """Raise ValueError if the loss reads a missing teacher, or if one of several teachers is sharded.

    used_numbers: in ascending order.
    """
    count = len(teachers)
    if used_numbers and used_numbers[-1] >= count:
        numbers = "number 0 alone" if count == 1 else f"numbers 0 to {count - 1}"
        raise ValueError(
            f"objectives: a divergence compares with teacher number {used_numbers[-1]}, and there is "
            f"{numbers}: give it in `more_teachers`"
        )
    if count > 1 and any(isinstance(teacher, LiveTeacher) and teacher.is_sharded for teacher in teachers):
        raise ValueError(
            f"{count} teachers cannot be sharded by FSDP or DeepSpeed: keep them whole, and `parked` if they "
            "do not fit at once"
        )


def check_row_routes(all_terms: Iterable[WeightedLosses], routes: Tensor | None) -> None:
    """Raise ValueError if a divergence is routed and a row names none of its teachers.

    routes: (N, 1), each row's teacher; None: no row names one.
    """
    for target in {term.target for terms in all_terms for term in terms if term.target.routed}:
        row_teachers = [] if routes is None else sorted(set(routes.flatten().tolist()))
        if not row_teachers or not set(row_teachers) <= set(target.teachers):
            is_missing = not row_teachers or -1 in row_teachers
            named = "none" if is_missing else f"number {max(row_teachers)}"
            raise ValueError(
                f"a divergence is routed to the teachers {target.teachers}, and a row names {named}: give "
                "each row a column `teacher` with the number of one of them"
            )


def run_inside_forward(
    wrapped: nn.Module, inner: nn.Module, method: Callable[..., Any], argument: Any
) -> Any:
    """Return method(argument), run within `wrapped`'s forward, where DDP and FSDP make the weights available.

    inner: the unwrapped model; if it is `wrapped` itself, and no FSDP module, `method` is called directly.
    """
    if wrapped is inner and not isinstance(inner, FSDPModule):
        return method(argument)
    return _ForwardRedirection()(wrapped, inner, method, argument)
