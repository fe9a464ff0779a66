"""Classifiers and regressions: tell their kind, compare their labels, and shape their logits.

A classifier, be it an encoder or a decoder, reads the prompt of `Sequences`, padded on the right; each label
is one position of the completion. Shapes: N rows, P input tokens, C labels per row (1, or P), V label names.
"""

from typing import Any, Literal, get_args

from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from gkd_lab.models.vocabulary import check_ids_fit, find_tokenizer_difference

ClassifierKind = Literal["sequence-classification", "token-classification", "regression"]

_SEQUENCE_CLASSIFIER_NAMES = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
_TOKEN_CLASSIFIER_NAMES = frozenset(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values())


def get_classifier_kind(model: Any) -> ClassifierKind | None:
    """Return the kind of an unwrapped classifier by its class and config, or None for a language model.

    Raises:
        ValueError: for multi-label classification, and for a regression of several numbers.
    """
    names = {ancestor.__name__ for ancestor in type(model).__mro__}
    if names & _TOKEN_CLASSIFIER_NAMES or isinstance(model, GenericForTokenClassification):
        return "token-classification"
    if names & _SEQUENCE_CLASSIFIER_NAMES or isinstance(model, GenericForSequenceClassification):
        return _read_sequence_classifier_kind(model.config)
    return None


def _read_sequence_classifier_kind(config: PretrainedConfig) -> ClassifierKind:
    """Return "regression" or "sequence-classification" by the config; ValueError for multi-output ones."""
    numeric = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    if config.problem_type == "multi_label_classification" or (numeric and config.num_labels > 1):
        raise ValueError(
            f"problem_type={config.problem_type!r} with {config.num_labels} labels is not distilled here: a "
            'row has one label ("single_label_classification") or one number ("regression", num_labels=1)'
        )
    return "regression" if numeric else "sequence-classification"


def parse_classifier_kind(family: str) -> ClassifierKind | None:
    """Return `family` itself if it is the name of a kind of classifier, or None for a language model."""
    return next((kind for kind in get_args(ClassifierKind) if kind == family), None)


def get_classifier_auto_class(config: PretrainedConfig) -> Any | None:
    """Return the auto class for a token or sequence classifier's config; None for other architectures."""
    architectures = set(config.architectures or ())
    if architectures & _TOKEN_CLASSIFIER_NAMES:
        return AutoModelForTokenClassification
    return AutoModelForSequenceClassification if architectures & _SEQUENCE_CLASSIFIER_NAMES else None


def add_label_axis(logits: Tensor, kind: ClassifierKind) -> Tensor:
    """Return logits as (N, C, V): (N, P, V) of a token classifier unchanged, (N, V) of others with C = 1."""
    return logits if kind == "token-classification" else logits[:, None]


def list_label_names(model: PreTrainedModel) -> list[str]:
    """List a classifier's label names by `config.id2label`, in the order of its logits."""
    names = model.config.id2label
    return [names[n] for n in range(model.config.num_labels)]


def match_teacher_labels(
    student: PreTrainedModel, teacher: PreTrainedModel, kind: ClassifierKind
) -> list[int] | None:
    """Return for each student label the teacher's logit index; None if the order is equal or for regression.

    Raises:
        ValueError: if the labels differ; the message names the difference.
    """
    student_labels, teacher_labels = list_label_names(student), list_label_names(teacher)
    if kind == "regression" or student_labels == teacher_labels:
        return None
    student_only = sorted(set(student_labels) - set(teacher_labels))
    teacher_only = sorted(set(teacher_labels) - set(student_labels))
    if student_only or teacher_only or len(student_labels) != len(teacher_labels):
        extra = _format_extra_labels("student", student_only) + _format_extra_labels("teacher", teacher_only)
        raise ValueError(
            f"student and teacher must have the same labels: the student has {_format_labels(student_labels)}"
            f", the teacher has {_format_labels(teacher_labels)}{extra}; load the student with "
            "`id2label=teacher.config.id2label, label2id=teacher.config.label2id`, or rename one's labels"
        )
    return [teacher_labels.index(label) for label in student_labels]


def _format_labels(labels: list[str]) -> str:
    """Return the number of labels and the first eight names as text, such as "2 ('no', 'yes')"."""
    first = ", ".join(map(repr, labels[:8]))
    return f"{len(labels)} ({first}{', ...' if len(labels) > 8 else ''})"


def _format_extra_labels(owner: str, labels: list[str]) -> str:
    """Return "; only the {owner} has 'x', ..." with the first eight labels; an empty string for no labels."""
    return f"; only the {owner} has {', '.join(map(repr, labels[:8]))}" if labels else ""


def check_classifier_tokenizers(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, teacher_tokenizer: Any | None
) -> None:
    """Raise ValueError if the tokenizers differ, or the student's has ids beyond either model's vocabulary.

    An unknown teacher tokenizer (None) is not compared.
    """
    if teacher_tokenizer is not None:
        reason = find_tokenizer_difference(tokenizer, teacher_tokenizer)
        if reason is not None:
            raise ValueError(
                f"teacher and student must read the same ids, but their tokenizers differ: {reason}; choose "
                "a student of the teacher's family. If the teacher was trained with another tokenizer than "
                "its folder's, give it as `teacher_processing_class`"
            )
    models = {"student": student, "teacher": teacher}
    check_ids_fit(tokenizer, {name: m.config.get_text_config().vocab_size for name, m in models.items()})


def set_pad_token_id(model: PreTrainedModel, pad_id: int) -> None:
    """Set `pad_token_id` in the model's config, by which decoders find the last real token to classify."""
    model.config.get_text_config().pad_token_id = pad_id
