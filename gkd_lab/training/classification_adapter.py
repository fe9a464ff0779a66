"""Classification: rows are texts with labels (one per text or one per token) or numbers; nothing is written.

Shapes: N rows, P input tokens, V labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from gkd_lab.encoding.labelled_rows import (
    ClassificationCollator,
    LabelledRowEncoder,
    build_labelled_sequences,
    build_transformers_batch,
)
from gkd_lab.encoding.trl_batch import NOT_TRAINED, has_sequence_tensors
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.squared_error import LabelSquaredError, SquaredError
from gkd_lab.losses.terms import WeightedLoss, are_rows_routed
from gkd_lab.metrics.classifier_metrics import correlate, score_labels
from gkd_lab.models.classifiers import (
    ClassifierKind,
    check_classifier_tokenizers,
    list_label_names,
    match_teacher_labels,
    set_pad_token_id,
)
from gkd_lab.models.forward import Sequences, compute_completion_logits, unwrap_model
from gkd_lab.teachers.load_teachers import TeacherSet
from gkd_lab.teachers.teacher import LiveTeacher, TeacherInterface
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.rollout import GenerationLimits


class ClassificationAdapter:
    """Task adapter of classifiers: one label per text, one per token, or a number.

    Raises:
        ValueError: for teachers with other labels or token ids, arguments that let a classifier write, and
            loss terms that do not fit.
    """

    can_generate = False

    def __init__(
        self,
        kind: ClassifierKind,
        student: PreTrainedModel,
        tokenizer: Any,
        teachers: TeacherSet,
        cells: Sequence[CellArguments],
        args: GKDConfig,
        formatting_func: Callable[[Any], Any] | None,
    ) -> None:
        student = unwrap_model(student)
        self.kind, self.label_names = kind, list_label_names(student)
        self._match_teachers_to_student(student, tokenizer, teachers)
        for name in ("seq_kd", "use_vllm", "eval_on_policy"):
            if getattr(args, name):
                raise ValueError(f"{name}=True lets a model write, and a {kind} model writes nothing")
        self.cells = [self._resolve_cell(cell) for cell in cells]
        no_end_ids = torch.tensor([], dtype=torch.long)
        self.limits = GenerationLimits(
            args.max_new_tokens, no_end_ids, tokenizer.pad_token_id, len(self.label_names)
        )
        self.encode_row = LabelledRowEncoder(
            tokenizer,
            kind,
            self.label_names,
            max_length=args.max_length,
            labels_required=any(term.reads_labels for cell in self.cells for term in cell.list_terms()),
            formatting_func=formatting_func,
            reads_teacher=are_rows_routed(cell.list_terms() for cell in self.cells),
        )
        self.collate = ClassificationCollator(self.encode_row, tokenizer.pad_token_id, kind)

    def _match_teachers_to_student(
        self, student: PreTrainedModel, tokenizer: Any, teachers: TeacherSet
    ) -> None:
        """Check teachers' ids and labels (ValueError), keep their label columns, set all pad token ids."""
        pairs = teachers.list_models_and_tokenizers()
        models = [(unwrap_model(model), teacher_tokenizer) for model, teacher_tokenizer in pairs]
        for teacher, teacher_tokenizer in models:
            check_classifier_tokenizers(student, teacher, tokenizer, teacher_tokenizer)
        self.teacher_label_columns = [
            match_teacher_labels(student, teacher, self.kind) for teacher, _ in models
        ]
        for model in (student, *(teacher for teacher, _ in models)):
            set_pad_token_id(model, tokenizer.pad_token_id)

    def _resolve_cell(self, cell: CellArguments) -> CellArguments:
        """Return the cell, in a regression with a default loss; ValueError for lmbda > 0 and unfit terms."""
        if cell.lmbda > 0:
            raise ValueError(
                f"lmbda={cell.lmbda:g} lets the student write its own text, and a {self.kind} model writes "
                "nothing: set lmbda=0"
            )
        if not cell.objectives and self.kind == "regression":
            cell = replace(cell, objectives=(WeightedLoss(SquaredError()),))
        for term in cell.list_terms():
            self._check_term(term)
        return cell

    def _check_term(self, term: WeightedLoss) -> None:
        """Raise ValueError for a loss term that this kind (classes or regression) cannot have."""
        is_regression = self.kind == "regression"
        if not isinstance(term.loss, Divergence | CrossEntropy | SquaredError | LabelSquaredError):
            raise ValueError(
                f"objectives: {term.loss.log_name} reads what only a language model has; leave it out"
            )
        if is_regression and isinstance(term.loss, Divergence | CrossEntropy):
            raise ValueError(
                f"objectives: {term.loss.log_name} compares distributions, and a regression has one number: "
                "choose {'type': 'squared_error'}, against the teacher or, with 'against': 'labels', the data"
            )
        if not is_regression and isinstance(term.loss, LabelSquaredError):
            raise ValueError(
                "objectives: squared_error against labels needs numbers: of classes choose cross_entropy"
            )

    def parse_batch(self, batch: Mapping[str, Any]) -> Sequences:
        """Convert a batch of our or transformers' collator to `Sequences`; ValueError if tensors lack."""
        if has_sequence_tensors(batch):
            return Sequences(
                **{name: batch[name] for name in Sequences.__dataclass_fields__ if name in batch}
            )
        missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in batch]
        if missing:
            raise ValueError(
                f"the data collator returns {sorted(batch)} without {', '.join(missing)}; transformers' "
                "DataCollatorWithPadding and DataCollatorForTokenClassification return them"
            )
        labels = batch["labels"].view(len(batch["input_ids"]), -1)
        labels = labels.float() if self.kind == "regression" else labels
        return build_labelled_sequences(
            batch["input_ids"], batch["attention_mask"], labels, batch.get("token_type_ids")
        )

    def build_trl_fields(self, rows: Sequences) -> dict[str, Tensor]:
        """Return an empty dict: TRL's trainer has no classifiers."""
        return {}

    def compute_logits_and_labels(self, model: Any, rows: Sequences) -> tuple[Tensor, Tensor]:
        """Run the model; return logits (N, V), labels (N,); for tokens (N, P, V), (N, P). No label: -100."""
        logits = compute_completion_logits(model, rows)
        labels = build_transformers_batch(rows, self.kind)["labels"]
        return logits if self.kind == "token-classification" else logits[:, 0], labels

    def reorder_teacher_labels(self, teachers: Sequence[TeacherInterface]) -> None:
        """Assign the columns found in `__init__` to live teachers' heads, for the student's label order."""
        for teacher, columns in zip(teachers, self.teacher_label_columns, strict=True):
            if isinstance(teacher, LiveTeacher):
                teacher.head.logit_indices = columns

    def create_text_teacher(self, teacher: TeacherInterface) -> None:
        """Return None: no loss term of a classifier reads texts."""

    @property
    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Return `compute_classification_metrics` with this task's kind and number of labels filled in."""
        return partial(compute_classification_metrics, kind=self.kind, n_labels=len(self.label_names))


def compute_classification_metrics(
    evaluation: EvalPrediction, *, kind: ClassifierKind, n_labels: int
) -> dict[str, float]:
    """Return accuracy, macro F1, Matthews (two labels: F1 too); for a regression Pearson and Spearman.

    Unlabelled rows are left out. Values are from 0 to 1, correlations from -1; the result is empty without a
    labelled row (for a regression without two).
    """
    predictions, labels = np.asarray(evaluation.predictions), np.asarray(evaluation.label_ids)
    if kind == "regression":
        is_labelled = np.isfinite(labels)
        x, y = predictions.reshape(-1)[is_labelled], labels[is_labelled]
        if len(y) < 2:
            return {}
        return {metric: correlate(metric, x, y) for metric in ("pearson", "spearman")}
    is_labelled = labels != NOT_TRAINED
    x, y = predictions.argmax(-1)[is_labelled], labels[is_labelled]
    if not len(y):
        return {}
    values = {rule: score_labels(rule, x, y) for rule in ("accuracy", "f1_macro")}
    if n_labels == 2:
        values["f1"] = score_labels("f1_binary", x, y, positive=1)
    return {**values, "matthews": score_labels("matthews", x, y)}
