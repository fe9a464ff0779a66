"""The teachers of a run as a user hands them over: loaded, compared with the student, put in their places."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.loading import load_teacher
from gkd_lab.models.vocabulary import get_compared_vocabulary_size, load_model_tokenizer
from gkd_lab.teachers.cached_teachers import ModelFreeTeacher, get_vocabulary_size
from gkd_lab.teachers.teacher import LiveTeacher, Teacher, TeacherInterface


@dataclass(frozen=True)
class TeacherSet:
    """The first one, a model or a source of scores, and all others, which are models."""

    first: Any
    tokenizer: Any
    """Of the first; None: it is not known."""
    other_models: tuple[PreTrainedModel, ...]
    other_teachers: tuple[Teacher, ...]

    @classmethod
    def load(
        cls,
        teacher: Any,
        other_teachers: Sequence[Teacher],
        student: PreTrainedModel,
        cells: Sequence[CellArguments],
        args: Any,
        *,
        tokenizer: Any,
        student_tokenizer: Any,
        is_copy: bool,
    ) -> "TeacherSet":
        """Loaded and frozen. tokenizer: the first one's, where it was stated; of_student: the student's.

        Raises ValueError for teachers that do not fit the student or what the cells ask of them.
        """
        if isinstance(teacher, ModelFreeTeacher):
            teacher.check_compatibility(student, cells, args)
            first, own = teacher, teacher.tokenizer
        else:
            first = load_teacher(
                teacher,
                name_or_path=args.teacher_model_name_or_path,
                init_kwargs=args.teacher_model_init_kwargs,
                student=student,
                dtype=args.teacher_dtype,
                trust_remote_code=args.trust_remote_code,
            )
            own = student_tokenizer if is_copy else load_model_tokenizer(first)
        loaded = (one.load_model(student, trust_remote_code=args.trust_remote_code) for one in other_teachers)
        return cls(first, tokenizer or own, tuple(loaded), tuple(other_teachers))

    def list_models_and_tokenizers(self) -> list[tuple[Any, Any]]:
        """Each teacher and its tokenizer, by number."""
        others = zip(self.other_teachers, self.other_models, strict=True)
        return [
            (self.first, self.tokenizer),
            *((model, one.processing_class or load_model_tokenizer(model)) for one, model in others),
        ]

    def count_shared_vocabulary(
        self, student: PreTrainedModel, tokenizer: Any, compared: Collection[int]
    ) -> int:
        """How many leading entries all can be compared on; `compared`: numbers of those that are.

        Raises ValueError for a tokenizer that is not the student's.
        """
        return min(
            get_compared_vocabulary_size(
                student, get_vocabulary_size(one), tokenizer, own, compares_tokens=number in compared
            )
            for number, (one, own) in enumerate(self.list_models_and_tokenizers())
        )

    def place_teachers(self, accelerator: Accelerator, *, parked: bool) -> list[TeacherInterface]:
        """Where the run needs them; `parked` holds for those that say nothing themselves."""
        first = self.first
        if not isinstance(first, ModelFreeTeacher):
            first = LiveTeacher(first, accelerator, parked=parked)
        return [
            first,
            *(
                LiveTeacher(model, accelerator, parked=parked if one.parked is None else one.parked)
                for one, model in zip(self.other_teachers, self.other_models, strict=True)
            ),
        ]
