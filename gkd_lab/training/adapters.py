"""Task adapter: everything that language modelling and classification do differently in a training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import EvalPrediction

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.models.forward import Sequences, unwrap_model
from gkd_lab.teachers.load_teachers import TeacherSet
from gkd_lab.teachers.teacher import TeacherInterface
from gkd_lab.teachers.text_teacher import TeacherPrompts, TextTeacher
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.classification_adapter import ClassificationAdapter
from gkd_lab.training.language_modeling_adapter import LanguageModelingAdapter
from gkd_lab.training.rollout import GenerationLimits


class TaskAdapter(Protocol):
    """The task of a training: rows to batches, and batches to what the Trainer evaluates.

    can_generate: Whether the student can write completions, so that steps can be on-policy.
    limits: Pad id, end ids, and V, the vocabulary entries or labels that are compared.
    """

    can_generate: bool
    limits: GenerationLimits

    @property
    def cells(self) -> Sequence[CellArguments]:
        """The cells' arguments with the task's default loss."""
        ...

    @property
    def encode_row(self) -> Callable[[Any], Any]:
        """Encodes one dataset row."""
        ...

    @property
    def collate(self) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Makes a batch of dataset rows, if the user gives no collator."""
        ...

    @property
    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """Metrics of an evaluation, if the user gives none; None: the loss alone."""
        ...

    def parse_batch(self, batch: Mapping[str, Any]) -> Sequences:
        """Convert a collated batch, ours or a user's collator's. Raises ValueError for another form."""
        ...

    def build_trl_fields(self, rows: Sequences) -> dict[str, Tensor]:
        """Return the rows as TRL lays out a batch, for a subclass that was written for TRL."""
        ...

    def compute_logits_and_labels(self, model: Any, rows: Sequences) -> tuple[Tensor, Tensor]:
        """Return what `compute_metrics` gets; labels are -100 where nothing is trained."""
        ...

    def align_teachers(self, teachers: Sequence[TeacherInterface]) -> None:
        """Make the teachers name their outputs in the student's order."""
        ...

    def create_text_teacher(self, teacher: TeacherInterface) -> TextTeacher | None:
        """Create the teacher that reads texts in its own tokens; None: no term of the loss needs it."""
        ...


def build_adapter(
    student: Any,
    tokenizer: Any,
    teachers: TeacherSet,
    cells: Sequence[CellArguments],
    args: GKDConfig,
    formatting_func: Callable[[Any], Any] | None,
    teacher_prompts: TeacherPrompts | None,
    *,
    is_stream: bool,
) -> TaskAdapter:
    """Build the adapter of the student's task; `is_stream`: the rows are iterated, not indexed.

    Raises ValueError for cells or arguments that do not fit it.
    """
    kind = get_classifier_kind(unwrap_model(student))
    if kind is None:
        return LanguageModelingAdapter(
            student, tokenizer, teachers, cells, args, formatting_func, teacher_prompts, is_stream=is_stream
        )
    return ClassificationAdapter(kind, student, tokenizer, teachers, cells, args, formatting_func)
