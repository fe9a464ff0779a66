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
        """Return the cells' arguments; a regression cell without objectives has got the default loss."""
        ...

    @property
    def encode_row(self) -> Callable[[Any], Any]:
        """Return the callable that encodes one dataset row to an example of token ids (and labels)."""
        ...

    @property
    def collate(self) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Return the default data collator, a callable: dataset rows -> batch of padded tensors by name."""
        ...

    @property
    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """Return the default `compute_metrics` of an evaluation; None: only the loss is evaluated."""
        ...

    def parse_batch(self, batch: Mapping[str, Any]) -> Sequences:
        """Convert a batch of our or the user's collator to `Sequences`; ValueError for an unknown form."""
        ...

    def build_trl_fields(self, rows: Sequences) -> dict[str, Tensor]:
        """Return the rows as TRL's batch tensors by name, for a TRL subclass; empty for classifiers."""
        ...

    def compute_logits_and_labels(self, model: Any, rows: Sequences) -> tuple[Tensor, Tensor]:
        """Run the model and return (logits, labels) for `compute_metrics`; untrained labels are -100."""
        ...

    def reorder_teacher_labels(self, teachers: Sequence[TeacherInterface]) -> None:
        """Set the teachers' heads to return labels in the student's order; language models need nothing."""
        ...

    def create_text_teacher(self, teacher: TeacherInterface) -> TextTeacher | None:
        """Wrap `teacher` to read texts in its own tokens; return None if no loss term (`uld`) needs that."""
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
    """Return a ClassificationAdapter if the student is a classifier, else a LanguageModelingAdapter.

    `is_stream`: the rows are iterated, not indexed. Raises ValueError for cells or arguments that do not fit.
    """
    kind = get_classifier_kind(unwrap_model(student))
    if kind is None:
        return LanguageModelingAdapter(
            student, tokenizer, teachers, cells, args, formatting_func, teacher_prompts, is_stream=is_stream
        )
    return ClassificationAdapter(kind, student, tokenizer, teachers, cells, args, formatting_func)
