"""Classifiers through the same trainer: what their rows are, and what is asked of a pair.

A row has one label, or one a token, or a number; a label is a position of the completion. Nothing is written.
Shapes: N rows, P input tokens, C labels of a row (1, or P), V labels that there are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from gkd_lab.config.errors import suggest_choices
from gkd_lab.encoding.batches import TruncationCounts
from gkd_lab.encoding.row_encoder import read_teacher_index
from gkd_lab.encoding.trl_batch import NOT_TRAINED, has_sequence_tensors
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.squared_error import LabelSquaredError, SquaredError
from gkd_lab.losses.terms import WeightedLoss
from gkd_lab.metrics.classifier_metrics import correlate, score_labels
from gkd_lab.models.classifiers import (
    ClassifierKind,
    check_classifier_tokenizers,
    get_classifier_kind,
    list_label_names,
    match_teacher_labels,
    set_pad_token_id,
)
from gkd_lab.models.forward import Sequences, compute_completion_logits, unwrap_model
from gkd_lab.teachers.teacher import LiveTeacher, TeacherInterface
from gkd_lab.training.arguments import GKDConfig

Row = Mapping[str, Any]
UNKNOWN_LABEL = -1
"""In the place of a label that no term reads: the position counts, and no metric does."""
CLASSIFICATION_ROW_FORMATS = """\
  `text`, with or without `text_pair`
  `tokens`: the words of a text, split
  `input_ids`, with or without `attention_mask` and `token_type_ids`"""


@dataclass(frozen=True)
class LabelledExample:
    """Ids of one row, and its labels: one, or one for each token; of a regression a number.

    Labels are NOT_TRAINED where nothing counts, and UNKNOWN (of a regression NaN) where none was given.
    teacher_index: the number of the teacher that the row is meant for; -1: of any.
    """

    input_ids: list[int]
    labels: list[int] | list[float]
    token_type_ids: list[int] | None = None
    teacher_index: int = -1

    def truncate(self, max_tokens: int) -> "LabelledExample":
        """Cut after so many tokens."""
        labels = self.labels[:max_tokens] if len(self.labels) == len(self.input_ids) else self.labels
        types = None if self.token_type_ids is None else self.token_type_ids[:max_tokens]
        return replace(self, input_ids=self.input_ids[:max_tokens], labels=labels, token_type_ids=types)

    @property
    def prompt_ids(self) -> list[int]:
        """What the model reads, as `Example` calls it."""
        return self.input_ids

    @property
    def completion_ids(self) -> Sequence[float]:
        """What is trained on, one position a label."""
        return self.labels


def encode_labelled_rows(
    tokenizer: Any,
    kind: ClassifierKind,
    names: Sequence[str],
    rows: Sequence[tuple[str, str]],
    *,
    max_input_tokens: int,
) -> tuple[list[LabelledExample], TruncationCounts]:
    """(text, target) pairs as ids; a target is a label's name, a tag for each word, or a number."""
    encode = LabelledRowEncoder(tokenizer, kind, names, max_length=None, labels_required=True)
    whole = [encode(_build_classification_row(kind, text, target)) for text, target in rows]
    cut = TruncationCounts(
        rows=len(rows), prompts=sum(len(row.input_ids) > max_input_tokens for row in whole), completions=0
    )
    return [row.truncate(max_input_tokens) for row in whole], cut


def _build_classification_row(kind: ClassifierKind, text: str, target: str) -> Row:
    if kind == "token-classification":
        return {"tokens": text.split(), "labels": target.split()}
    return {"text": text, "label": float(target) if kind == "regression" else target}


class LabelledRowEncoder:
    """Turns a row of a user's data set into a `LabelledExample`, cut after `max_length` tokens.

    A label is its number or its name. Of `tokens` the first piece of a word has the word's label and its
    other pieces none. `label` and `labels` are the same column. Without `needed` it may be missing: soft
    targets read none.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: ClassifierKind,
        names: Sequence[str],
        *,
        max_length: int | None,
        labels_required: bool,
        formatting_func: Callable[[Row], Row] | None = None,
    ) -> None:
        self.tokenizer, self.kind, self.names = tokenizer, kind, tuple(names)
        limits = [limit for limit in (max_length, tokenizer.model_max_length) if limit is not None]
        self.max_length, self.labels_required = min(limits), labels_required
        self.formatting_func = formatting_func

    def __call__(self, row: Row | LabelledExample) -> LabelledExample:
        """The row as ids. ValueError: it has no known form, or a label that is none of the model's."""
        if isinstance(row, LabelledExample):
            return row
        row = row if self.formatting_func is None else self.formatting_func(row)
        row = {column: value for column, value in row.items() if value is not None}
        ids, types, words = self._tokenize_row(row)
        ids, words = ids[: self.max_length], words[: self.max_length]
        if not ids:
            raise ValueError("the row's text is empty: there is nothing to classify")
        types = None if types is None else types[: self.max_length]
        return LabelledExample(ids, self._encode_labels(row, words), types, read_teacher_index(row))

    def _tokenize_row(self, row: Row) -> tuple[list[int], list[int] | None, list[int | None]]:
        """Ids, which text of a pair each belongs to, and which of the row's labels; None: none."""
        if "input_ids" in row:
            ids = [int(i) for i in row["input_ids"]]
            kept = [n for n, real in enumerate(row.get("attention_mask", [1] * len(ids))) if real]
            types = row.get("token_type_ids")
            return [ids[n] for n in kept], types and [int(types[n]) for n in kept], list(kept)
        if "tokens" not in row and "text" not in row:
            raise ValueError(
                f"no text can be read from a row with the columns {sorted(row)}; known:\n{CLASSIFICATION_ROW_FORMATS}"
            )
        split = "tokens" in row
        texts = [list(row["tokens"])] if split else [row[c] for c in ("text", "text_pair") if c in row]
        read = self.tokenizer(
            *texts, is_split_into_words=split, truncation=True, max_length=min(self.max_length, 2**31)
        )
        ids = read["input_ids"]
        return ids, read.get("token_type_ids"), self._map_tokens_to_labels(read, split, len(ids))

    def _map_tokens_to_labels(self, read: Any, split: bool, count: int) -> list[int | None]:
        if self.kind != "token-classification":
            return [None] * count
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not say which word a token belongs to: give rows with "
                "`input_ids` and a label for each"
            )
        if not split:
            return [None if mask else n for n, mask in enumerate(_find_special_tokens(read, count))]
        words = read.word_ids()
        return [word if word not in words[:n] else None for n, word in enumerate(words)]

    def _encode_labels(self, row: Row, words: Sequence[int | None]) -> list[int] | list[float]:
        column = next((name for name in ("labels", "label") if name in row), None)
        if column is None and self.labels_required:
            raise ValueError(
                f"the row has no `label`, which the loss reads; its columns are {', '.join(sorted(row))}. "
                "Soft targets alone need none: leave out the terms that read labels"
            )
        if self.kind == "token-classification":
            return self._encode_token_labels(row, column, words)
        value = None if column is None else row[column]
        return (
            [self._parse_regression_label(value)]
            if self.kind == "regression"
            else [self._encode_class_label(value)]
        )

    def _encode_token_labels(self, row: Row, column: str | None, words: Sequence[int | None]) -> list[int]:
        if column is None:
            return [NOT_TRAINED if word is None else UNKNOWN_LABEL for word in words]
        given = row[column]
        expected = next((len(row[name]) for name in ("tokens", "input_ids") if name in row), None)
        if expected is None:
            raise ValueError("a label for each token needs the row as `tokens` or `input_ids`, not as `text`")
        if isinstance(given, str | int) or len(given) != expected:
            found = "1" if isinstance(given, str | int) else str(len(given))
            raise ValueError(f"`{column}` has {found} entries for {expected} tokens: give one for each")
        return [NOT_TRAINED if word is None else self._encode_class_label(given[word]) for word in words]

    def _encode_class_label(self, value: Any) -> int:
        """A label's number."""
        if value is None:
            return UNKNOWN_LABEL
        if isinstance(value, str):
            if value not in self.names:
                raise ValueError(
                    f"label {value!r} is none of the model's; {suggest_choices(value, self.names)}"
                )
            return self.names.index(value)
        number = int(value)
        if number == NOT_TRAINED and self.kind == "token-classification":
            return number
        if number != value or not 0 <= number < len(self.names):
            raise ValueError(
                f"label {value!r} is out of range: the model has {len(self.names)} labels, 0 to "
                f"{len(self.names) - 1} ({', '.join(self.names[:8])})"
            )
        return number

    def _parse_regression_label(self, value: Any) -> float:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"label {value!r} is no number, and a regression learns numbers")
        return number


def _find_special_tokens(read: Any, count: int) -> list[bool]:
    """Which of the ids the tokenizer added itself."""
    return [sequence is None for sequence in (read.sequence_ids() if count else [])]


@dataclass(frozen=True)
class ClassificationCollator:
    """Rows as tensors by name, padded on the right."""

    encode_row: Callable[[Any], LabelledExample]
    pad_id: int
    kind: ClassifierKind

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        return collate_labelled_rows(
            [self.encode_row(row) for row in rows], self.pad_id, self.kind
        ).named_tensors()


def collate_labelled_rows(rows: Sequence[LabelledExample], pad_id: int, kind: ClassifierKind) -> Sequences:
    """Rows as `Sequences`: the text is the prompt, its labels are the completion."""
    width = max(len(row.input_ids) for row in rows)
    ids = _pad_id_lists([row.input_ids for row in rows], width, pad_id)
    mask = _pad_id_lists([[1] * len(row.input_ids) for row in rows], width, 0)
    types = None
    if any(row.token_type_ids for row in rows):
        types = _pad_id_lists([row.token_type_ids or [0] * len(row.input_ids) for row in rows], width, 0)
    if kind == "regression":
        labels = torch.tensor([row.labels for row in rows], dtype=torch.float32)
    else:
        longest = max(len(row.labels) for row in rows)
        labels = _pad_id_lists([row.labels for row in rows], longest, NOT_TRAINED)
    found = _build_labelled_sequences(ids, mask, labels, types)
    routes = [row.teacher_index for row in rows]
    return replace(found, teacher_indices=torch.tensor(routes)[:, None]) if max(routes) >= 0 else found


def _pad_id_lists(rows: Sequence[Sequence[Any]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def _build_labelled_sequences(ids: Tensor, mask: Tensor, labels: Tensor, types: Tensor | None) -> Sequences:
    """labels: (N, C). What does not count is a label 0 of a position that is not trained."""
    counts = labels != NOT_TRAINED
    return Sequences(ids, mask, labels.masked_fill(~counts, 0), counts.long(), types)


def build_transformers_batch(rows: Sequences, kind: ClassifierKind) -> dict[str, Tensor]:
    """What a classifier's own forward takes; labels are -100 where none counts. (N,), of tokens (N, P)."""
    labels = rows.completion_ids
    if kind != "regression":
        labels = labels.masked_fill((rows.completion_mask == 0) | (labels == UNKNOWN_LABEL), NOT_TRAINED)
    labels = labels if kind == "token-classification" else labels[:, 0]
    types = {} if rows.token_type_ids is None else {"token_type_ids": rows.token_type_ids}
    return {"input_ids": rows.prompt_ids, "attention_mask": rows.prompt_mask, **types, "labels": labels}


class ClassificationAdapter:
    """What the trainer does in another way for a pair of classifiers than for language models.

    Raises:
        ValueError: for a pair with other labels or ids, and for arguments that let a classifier write.
    """

    def __init__(
        self,
        kind: ClassifierKind,
        student: PreTrainedModel,
        teachers: Sequence[tuple[PreTrainedModel, Any]],
        tokenizer: Any,
        args: GKDConfig,
    ) -> None:
        self.kind, self.tokenizer = kind, tokenizer
        self.label_names = list_label_names(student)
        for teacher, own in teachers:
            check_classifier_tokenizers(student, teacher, tokenizer, own)
        self.teacher_label_columns = [match_teacher_labels(student, teacher, kind) for teacher, _ in teachers]
        for model in (student, *(teacher for teacher, _ in teachers)):
            set_pad_token_id(model, tokenizer.pad_token_id)
        for name in ("seq_kd", "use_vllm", "eval_on_policy"):
            if getattr(args, name):
                raise ValueError(
                    f"{name}=True lets a model write, and {_add_article(kind)} model writes nothing"
                )

    def align_teacher_labels(self, teachers: Sequence[TeacherInterface]) -> None:
        """Have each teacher, in the order of the pairs, name its labels in the student's order."""
        for teacher, columns in zip(teachers, self.teacher_label_columns, strict=True):
            if isinstance(teacher, LiveTeacher):
                teacher.head.logit_indices = columns

    def resolve_cell_arguments(self, cells: Sequence[CellArguments]) -> list[CellArguments]:
        """The same with what a regression learns by default; ValueError for what does not fit."""
        return [self._resolve_cell(cell) for cell in cells]

    def _resolve_cell(self, cell: CellArguments) -> CellArguments:
        if cell.lmbda > 0:
            raise ValueError(
                f"lmbda={cell.lmbda:g} lets the student write its own text, and {_add_article(self.kind)} model writes "
                "nothing: set lmbda=0"
            )
        if not cell.objectives and self.kind == "regression":
            cell = replace(cell, objectives=(WeightedLoss(SquaredError()),))
        for term in cell.list_terms():
            self._check_term(term)
        return cell

    def _check_term(self, term: WeightedLoss) -> None:
        numeric = self.kind == "regression"
        if not isinstance(term.loss, Divergence | CrossEntropy | SquaredError | LabelSquaredError):
            raise ValueError(f"objectives: {term.loss.log_name} reads what only a language model has; leave it out")
        if numeric and isinstance(term.loss, Divergence | CrossEntropy):
            raise ValueError(
                f"objectives: {term.loss.log_name} compares distributions, and a regression has one number: choose "
                "{'type': 'squared_error'}, against the teacher or, with 'against': 'labels', the data"
            )
        if not numeric and isinstance(term.loss, LabelSquaredError):
            raise ValueError(
                "objectives: squared_error against labels needs numbers: of classes choose cross_entropy"
            )

    def build_collator(
        self, cells: Sequence[CellArguments], args: GKDConfig, formatting_func: Callable[[Row], Row] | None
    ) -> ClassificationCollator:
        """Rows to tensors; labels may be missing where no cell's loss reads them."""
        needed = any(term.reads_labels for cell in cells for term in cell.list_terms())
        encode = LabelledRowEncoder(
            self.tokenizer,
            self.kind,
            self.label_names,
            max_length=args.max_length,
            labels_required=needed,
            formatting_func=formatting_func,
        )
        return ClassificationCollator(encode, self.tokenizer.pad_token_id, self.kind)

    def parse_batch(self, batch: Mapping[str, Any]) -> Sequences:
        """A collated batch, by our collator or by one of transformers'. ValueError: it is neither."""
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
        return _build_labelled_sequences(
            batch["input_ids"], batch["attention_mask"], labels, batch.get("token_type_ids")
        )

    def compute_logits_and_labels(self, model: Any, fixed: Sequences) -> tuple[Tensor, Tensor]:
        """What `compute_metrics` gets, as from transformers' Trainer: labels are -100 where none counts.

        (N, V) and (N,); of tokens (N, P, V) and (N, P).
        """
        logits = compute_completion_logits(model, fixed)
        labels = build_transformers_batch(fixed, self.kind)["labels"]
        return logits if self.kind == "token-classification" else logits[:, 0], labels

    @property
    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Metrics of an evaluation where the user gives none."""
        return partial(compute_classification_metrics, kind=self.kind, n_labels=len(self.label_names))


def build_classification_adapter(
    student: PreTrainedModel,
    teachers: Sequence[tuple[PreTrainedModel, Any]],
    tokenizer: Any,
    args: GKDConfig,
    *,
    use_default_arguments: bool = False,
) -> ClassificationAdapter | None:
    """None: these are language models. teachers: with the tokenizer of each, or None.

    With `unstated` arguments a classifier has `lmbda=0`, the only one it can have.
    """
    kind = get_classifier_kind(unwrap_model(student))
    if kind is None:
        return None
    if use_default_arguments:
        args.lmbda = 0.0
    bare = [(unwrap_model(teacher), own) for teacher, own in teachers]
    return ClassificationAdapter(kind, unwrap_model(student), bare, tokenizer, args)


def compute_classification_metrics(
    evaluation: EvalPrediction, *, kind: ClassifierKind, n_labels: int
) -> dict[str, float]:
    """Accuracy, macro F1, of two labels also F1 of the second, and Matthews' correlation; of a regression
    Pearson's and Spearman's. 0 to 1, correlations from -1; nothing where no row has a label.
    """
    found, true = np.asarray(evaluation.predictions), np.asarray(evaluation.label_ids)
    if kind == "regression":
        known = np.isfinite(true)
        x, y = found.reshape(-1)[known], true[known]
        if len(y) < 2:
            return {}
        return {metric: correlate(metric, x, y) for metric in ("pearson", "spearman")}
    known = true != NOT_TRAINED
    x, y = found.argmax(-1)[known], true[known]
    if not len(y):
        return {}
    values = {rule: score_labels(rule, x, y) for rule in ("accuracy", "f1_macro")}
    if n_labels == 2:
        values["f1"] = score_labels("f1_binary", x, y, positive=1)
    return {**values, "matthews": score_labels("matthews", x, y)}


def _add_article(kind: ClassifierKind) -> str:
    return f"a {kind}"
