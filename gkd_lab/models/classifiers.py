"""Models that say one of a few labels, or a number, of a text or of each of its tokens.

Encoders and decoders alike: a classifier reads the prompt of `Sequences`, padded on the right, and each label
is one position of the completion. Shapes: N rows, P input tokens, C labels of a row (1, or P), V labels.
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

from gkd_lab.models.vocabulary import find_tokenizer_difference

ClassifierKind = Literal["sequence-classification", "token-classification", "regression"]

_SEQUENCE_CLASSIFIER_NAMES = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
_TOKEN_CLASSIFIER_NAMES = frozenset(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values())


def get_classifier_kind(model: Any) -> ClassifierKind | None:
    """What a model that is not wrapped classifies; None: it is no classifier.

    Raises:
        ValueError: for several labels at once, and for a regression of several numbers.
    """
    names = {ancestor.__name__ for ancestor in type(model).__mro__}
    if names & _TOKEN_CLASSIFIER_NAMES or isinstance(model, GenericForTokenClassification):
        return "token-classification"
    if names & _SEQUENCE_CLASSIFIER_NAMES or isinstance(model, GenericForSequenceClassification):
        return _read_sequence_classifier_kind(model.config)
    return None


def _read_sequence_classifier_kind(config: PretrainedConfig) -> ClassifierKind:
    numeric = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    if config.problem_type == "multi_label_classification" or (numeric and config.num_labels > 1):
        raise ValueError(
            f"problem_type={config.problem_type!r} with {config.num_labels} labels is not distilled here: a "
            'row has one label ("single_label_classification") or one number ("regression", num_labels=1)'
        )
    return "regression" if numeric else "sequence-classification"


def parse_classifier_kind(family: str) -> ClassifierKind | None:
    """The kind of classifier that a cell's family of models is; None: it writes."""
    return next((kind for kind in get_args(ClassifierKind) if kind == family), None)


def get_classifier_auto_class(config: PretrainedConfig) -> Any | None:
    """The class that loads what the configuration names as its architecture; None: it is no classifier."""
    named = set(config.architectures or ())
    if named & _TOKEN_CLASSIFIER_NAMES:
        return AutoModelForTokenClassification
    return AutoModelForSequenceClassification if named & _SEQUENCE_CLASSIFIER_NAMES else None


def add_label_axis(logits: Tensor, kind: ClassifierKind) -> Tensor:
    """A forward pass's logits with a position for each label: (N, V) or (N, P, V) -> (N, C, V)."""
    return logits if kind == "token-classification" else logits[:, None]


def list_label_names(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's labels in the order of its logits."""
    names = model.config.id2label
    return [names[n] for n in range(model.config.num_labels)]


def match_teacher_labels(
    student: PreTrainedModel, teacher: PreTrainedModel, kind: ClassifierKind
) -> list[int] | None:
    """Where the teacher has each of the student's labels; None: in the same places.

    Raises:
        ValueError: if they do not have the same labels; the message names the difference.
    """
    own, other = list_label_names(student), list_label_names(teacher)
    if kind == "regression" or own == other:
        return None
    missing, extra = (sorted(set(a) - set(b)) for a, b in ((own, other), (other, own)))
    if missing or extra or len(own) != len(other):
        raise ValueError(
            f"student and teacher must have the same labels: the student has {_format_labels(own)}, the teacher has "
            f"{_format_labels(other)}{_format_extra_labels('student', missing)}{_format_extra_labels('teacher', extra)}; load the student with "
            "`id2label=teacher.config.id2label, label2id=teacher.config.label2id`, or rename those of one"
        )
    return [other.index(label) for label in own]


def _format_labels(labels: list[str]) -> str:
    shown = ", ".join(map(repr, labels[:8]))
    return f"{len(labels)} ({shown}{', ...' if len(labels) > 8 else ''})"


def _format_extra_labels(owner: str, labels: list[str]) -> str:
    return f"; only the {owner} has {', '.join(map(repr, labels[:8]))}" if labels else ""


def check_classifier_tokenizers(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, teacher_tokenizer: Any | None
) -> None:
    """Both must read the same ids. Raises ValueError where that is known to be otherwise."""
    if teacher_tokenizer is not None:
        reason = find_tokenizer_difference(tokenizer, teacher_tokenizer)
        if reason is not None:
            raise ValueError(
                f"teacher and student read the same ids, and their tokenizers differ: {reason}; choose a "
                "student of the teacher's family. If the teacher was trained with another tokenizer than its "
                "folder's, give it as `teacher_processing_class`"
            )
    last = max(tokenizer.get_vocab().values())
    for owner, model in (("student", student), ("teacher", teacher)):
        size = model.config.get_text_config().vocab_size
        if last >= size:
            raise ValueError(
                f"the tokenizer has ids up to {last}, but the {owner} knows {size}: call "
                f"`resize_token_embeddings({last + 1})` on it, or give its own tokenizer"
            )


def set_pad_token_id(model: PreTrainedModel, pad_id: int) -> None:
    """A decoder classifies a row by the last token that is not the padding its configuration names."""
    model.config.get_text_config().pad_token_id = pad_id
