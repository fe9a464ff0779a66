"""The teachers of a run as a user hands them over: loaded, compared with the student, put in their places."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.loading import load_teacher
from gkd_lab.models.vocabulary import tokenizer_of, vocabulary_of
from gkd_lab.teachers.cached_teachers import TeacherSource, size_or_model
from gkd_lab.teachers.teacher import LiveTeacher, Teacher, Teaching


@dataclass(frozen=True)
class GivenTeachers:
    """The first one, a model or a source of scores, and all others, which are models."""

    first: Any
    tokenizer: Any
    """Of the first; None: it is not known."""
    more: tuple[PreTrainedModel, ...]
    described: tuple[Teacher, ...]

    @classmethod
    def of(
        cls,
        teacher: Any,
        more: Sequence[Teacher],
        student: PreTrainedModel,
        cells: Sequence[CellArguments],
        args: Any,
        *,
        tokenizer: Any,
        of_student: Any,
        is_copy: bool,
    ) -> "GivenTeachers":
        """Loaded and frozen. tokenizer: the first one's, where it was stated; of_student: the student's.

        Raises ValueError for teachers that do not fit the student or what the cells ask of them.
        """
        if isinstance(teacher, TeacherSource):
            teacher.check(student, cells, args)
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
            own = of_student if is_copy else tokenizer_of(first)
        loaded = (one.loaded(student, trust_remote_code=args.trust_remote_code) for one in more)
        return cls(first, tokenizer or own, tuple(loaded), tuple(more))

    def with_tokenizers(self) -> list[tuple[Any, Any]]:
        """Each teacher and its tokenizer, by number."""
        others = zip(self.described, self.more, strict=True)
        return [
            (self.first, self.tokenizer),
            *((model, one.processing_class or tokenizer_of(model)) for one, model in others),
        ]

    def vocabulary(self, student: PreTrainedModel, tokenizer: Any, compared: Collection[int]) -> int:
        """How many leading entries all can be compared on; `compared`: numbers of those that are.

        Raises ValueError for a tokenizer that is not the student's.
        """
        return min(
            vocabulary_of(student, size_or_model(one), tokenizer, own, compared=number in compared)
            for number, (one, own) in enumerate(self.with_tokenizers())
        )

    def placed(self, accelerator: Accelerator, *, parked: bool) -> list[Teaching]:
        """Where the run needs them; `parked` holds for those that say nothing themselves."""
        first = self.first
        if not isinstance(first, TeacherSource):
            first = LiveTeacher(first, accelerator, parked=parked)
        return [
            first,
            *(
                LiveTeacher(model, accelerator, parked=parked if one.parked is None else one.parked)
                for one, model in zip(self.described, self.more, strict=True)
            ),
        ]
