"""Load the teachers that the user names, compare them with the student and place them on the devices."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.loading import InitKwargs, load_teacher, merge_revision
from gkd_lab.models.peft_base import check_base_can_teach, is_base_of, without_adapters
from gkd_lab.models.vocabulary import get_compared_vocabulary_size, load_model_tokenizer
from gkd_lab.teachers.cached_teachers import ModelFreeTeacher
from gkd_lab.teachers.teacher import LiveTeacher, Teacher, TeacherInterface
from gkd_lab.teachers.text_teacher import TeacherPrompts


@dataclass(frozen=True)
class TeacherInputs:
    """The arguments of `GKDTrainer` that describe its teachers; see there."""

    model: PreTrainedModel | nn.Module | ModelFreeTeacher | str | None
    tokenizer: Any = None
    others: Sequence[Teacher] = ()
    prompts: TeacherPrompts | None = None


class TeacherArguments(Protocol):
    """The fields of `GKDConfig` that the teachers depend on."""

    seq_kd: bool
    eval_on_policy: bool
    trust_remote_code: bool
    teacher_dtype: str | None
    teacher_model_name_or_path: str | None
    teacher_model_revision: str | None

    @property
    def teacher_model_init_kwargs(self) -> InitKwargs:
        """Arguments of `from_pretrained` for a teacher that is loaded by name."""


@dataclass(frozen=True)
class TeacherSet:
    """The loaded teachers of a run: the first, a model or model-free, and all others, which are models."""

    first: Any
    tokenizer: Any
    """Tokenizer of the first teacher; None: unknown."""
    other_models: tuple[PreTrainedModel, ...]
    other_teachers: tuple[Teacher, ...]

    @classmethod
    def load(
        cls,
        inputs: TeacherInputs,
        student: PreTrainedModel,
        student_tokenizer: Any,
        cells: Sequence[CellArguments],
        args: TeacherArguments,
        *,
        is_copy: bool,
    ) -> "TeacherSet":
        """Return all teachers loaded and frozen; ValueError if one does not fit the student or the cells.

        is_copy: the first one is a copy of the student, or its base, and shares its tokenizer.
        """
        if isinstance(inputs.model, ModelFreeTeacher):
            inputs.model.check_compatibility(
                student, cells, seq_kd=args.seq_kd, eval_on_policy=args.eval_on_policy
            )
            first: Any = inputs.model
            tokenizer = first.tokenizer
        else:
            first = load_teacher(
                inputs.model,
                name_or_path=args.teacher_model_name_or_path,
                init_kwargs=merge_revision(args.teacher_model_init_kwargs, args.teacher_model_revision),
                student=student,
                dtype=args.teacher_dtype,
                trust_remote_code=args.trust_remote_code,
            )
            tokenizer = student_tokenizer if is_copy else load_model_tokenizer(first)
        others = [
            teacher.load_model(student, trust_remote_code=args.trust_remote_code) for teacher in inputs.others
        ]
        return cls(first, inputs.tokenizer or tokenizer, tuple(others), tuple(inputs.others))

    def list_models_and_tokenizers(self) -> list[tuple[Any, Any]]:
        """Return (teacher, its tokenizer or None) for each teacher, in the order of their numbers."""
        others = zip(self.other_teachers, self.other_models, strict=True)
        return [
            (self.first, self.tokenizer),
            *((model, teacher.processing_class or load_model_tokenizer(model)) for teacher, model in others),
        ]

    def count_shared_vocabulary(
        self, student: PreTrainedModel, tokenizer: Any, compared: Collection[int]
    ) -> int:
        """Return the number of leading vocabulary entries that the student shares with all teachers.

        compared: numbers of the teachers that are compared token by token. Raises ValueError if one of these
        has another tokenizer than the student.
        """
        return min(
            get_compared_vocabulary_size(
                student,
                model.vocabulary_size if isinstance(model, ModelFreeTeacher) else model,
                tokenizer,
                teacher_tokenizer,
                compares_tokens=number in compared,
            )
            for number, (model, teacher_tokenizer) in enumerate(self.list_models_and_tokenizers())
        )

    def place_teachers(
        self, student: PreTrainedModel, accelerator: Accelerator, *, parked: bool
    ) -> list[TeacherInterface]:
        """Return all teachers ready to run, by number: models are moved to the device, sharded, or parked.

        student: with its adapter, if it has one; its base is a teacher where it stands. parked: the default
        of teachers that do not state it. Raises ValueError for such a base that is to be parked or sharded.
        """
        first = self.first
        if not isinstance(first, ModelFreeTeacher):
            first = _place_teacher_model(first, student, accelerator, parked=parked)
        return [
            first,
            *(
                _place_teacher_model(
                    model,
                    student,
                    accelerator,
                    parked=parked if teacher.parked is None else teacher.parked,
                )
                for teacher, model in zip(self.other_teachers, self.other_models, strict=True)
            ),
        ]


def _place_teacher_model(
    model: PreTrainedModel, student: PreTrainedModel, accelerator: Accelerator, *, parked: bool
) -> LiveTeacher:
    """Return a LiveTeacher; the base of the student's adapter runs without it. ValueError: see above."""
    if not is_base_of(student, model):
        return LiveTeacher(model, accelerator, parked=parked)
    check_base_can_teach(student)
    is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if parked or is_sharded:
        cause = "park_teacher=True" if parked else str(accelerator.distributed_type.value)
        raise ValueError(
            f"{cause} would move weights of the student, whose base the teacher is: turn it off, or pass a "
            "teacher with weights of its own"
        )
    return LiveTeacher(model, accelerator, parked=False, use_alone=partial(without_adapters, student))
