"""Rows of classification data to token ids with labels, and to padded tensors.

A row has one label, one label per token, or a number (regression). In `Sequences` the text is the prompt and
each label is one position of the completion. Shapes: N rows, P input tokens, C labels of a row (1, or P).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gkd_lab.config.errors import suggest_choices
from gkd_lab.encoding.batches import TruncationCounts
from gkd_lab.encoding.row_encoder import read_teacher_index
from gkd_lab.encoding.trl_batch import NOT_TRAINED
from gkd_lab.models.classifiers import ClassifierKind
from gkd_lab.models.forward import Sequences

Row = Mapping[str, Any]
UNKNOWN_LABEL = -1
"""Replaces a missing label that no loss term reads: the position is trained on, metrics skip it."""
CLASSIFICATION_ROW_FORMATS = """\
  `text`, with or without `text_pair`
  `tokens`: the words of a text, split
  `input_ids`, with or without `attention_mask` and `token_type_ids`"""


@dataclass(frozen=True)
class LabelledExample:
    """Token ids of one row and its labels: one class, one class per token, or a number (regression).

    A label is NOT_TRAINED at positions that do not count, and UNKNOWN_LABEL (regression: NaN) if it is
    missing.
    teacher_index: the teacher that the row is routed to; -1: not routed.
    """

    input_ids: list[int]
    labels: list[int] | list[float]
    token_type_ids: list[int] | None = None
    teacher_index: int = -1

    def truncate(self, max_tokens: int) -> "LabelledExample":
        """Return a copy with the first `max_tokens` tokens, and their labels if each token has one."""
        labels = self.labels[:max_tokens] if len(self.labels) == len(self.input_ids) else self.labels
        types = None if self.token_type_ids is None else self.token_type_ids[:max_tokens]
        return replace(self, input_ids=self.input_ids[:max_tokens], labels=labels, token_type_ids=types)

    @property
    def prompt_ids(self) -> list[int]:
        """The input ids, under the name that an `Example` gives them."""
        return self.input_ids

    @property
    def completion_ids(self) -> Sequence[float]:
        """The labels, under the name that an `Example` gives to what is trained on."""
        return self.labels


def encode_labelled_rows(
    tokenizer: Any,
    kind: ClassifierKind,
    names: Sequence[str],
    rows: Sequence[tuple[str, str]],
    *,
    max_input_tokens: int,
) -> tuple[list[LabelledExample], TruncationCounts]:
    """Encode (text, target) pairs; return (examples cut to their first tokens, counts of truncated rows).

    A target is a label's name, one tag per word, or a number.
    """
    encode_row = LabelledRowEncoder(tokenizer, kind, names, max_length=None, labels_required=True)
    examples = [encode_row(_build_classification_row(kind, text, target)) for text, target in rows]
    n_truncated = sum(len(example.input_ids) > max_input_tokens for example in examples)
    counts = TruncationCounts(rows=len(rows), prompts=n_truncated, completions=0)
    return [example.truncate(max_input_tokens) for example in examples], counts


def _build_classification_row(kind: ClassifierKind, text: str, target: str) -> Row:
    """Return a dataset row: tokens and labels split at spaces for tags, else text and one label or number."""
    if kind == "token-classification":
        return {"tokens": text.split(), "labels": target.split()}
    return {"text": text, "label": float(target) if kind == "regression" else target}


class LabelledRowEncoder:
    """Encodes a row of a user's dataset as a `LabelledExample`, truncated to `max_length` tokens.

    A label is a class number or a class name. In a row with `tokens` the first piece of a word gets the
    word's label and its other pieces get none. The columns `label` and `labels` mean the same. The column may
    be missing unless `labels_required`: soft targets read no labels. reads_teacher: as for `RowEncoder`.
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
        reads_teacher: bool = False,
    ) -> None:
        self.tokenizer, self.kind, self.names = tokenizer, kind, tuple(names)
        limits = [limit for limit in (max_length, tokenizer.model_max_length) if limit is not None]
        self.max_length, self.labels_required = min(limits), labels_required
        self.formatting_func, self.reads_teacher = formatting_func, reads_teacher

    def __call__(self, row: Row | LabelledExample) -> LabelledExample:
        """Encode a row. Raises ValueError for a row of another form and for a label that the model lacks."""
        if isinstance(row, LabelledExample):
            return row
        row = row if self.formatting_func is None else self.formatting_func(row)
        row = {column: value for column, value in row.items() if value is not None}
        ids, types, label_indices = self._tokenize_row(row)
        ids, label_indices = ids[: self.max_length], label_indices[: self.max_length]
        if not ids:
            raise ValueError("the row's text is empty: there is nothing to classify")
        types = None if types is None else types[: self.max_length]
        teacher_index = read_teacher_index(row) if self.reads_teacher else -1
        return LabelledExample(ids, self._encode_labels(row, label_indices), types, teacher_index)

    def _tokenize_row(self, row: Row) -> tuple[list[int], list[int] | None, list[int | None]]:
        """Return (token ids, token type ids or None, index of each token's label in the row or None)."""
        if "input_ids" in row:
            ids = [int(i) for i in row["input_ids"]]
            real = [n for n, is_real in enumerate(row.get("attention_mask", [1] * len(ids))) if is_real]
            types = row.get("token_type_ids")
            return [ids[n] for n in real], types and [int(types[n]) for n in real], list(real)
        if "tokens" not in row and "text" not in row:
            raise ValueError(
                f"no text can be read from a row with the columns {sorted(row)}; known forms:\n"
                f"{CLASSIFICATION_ROW_FORMATS}"
            )
        is_split = "tokens" in row
        texts = [list(row["tokens"])] if is_split else [row[c] for c in ("text", "text_pair") if c in row]
        encoding = self.tokenizer(
            *texts, is_split_into_words=is_split, truncation=True, max_length=min(self.max_length, 2**31)
        )
        ids = encoding["input_ids"]
        return ids, encoding.get("token_type_ids"), self._map_tokens_to_labels(encoding, is_split, len(ids))

    def _map_tokens_to_labels(self, encoding: Any, is_split: bool, count: int) -> list[int | None]:
        """Return for each token its label's index: only a word's first piece has one, the others None.

        All are None if the whole row has one label.
        """
        if self.kind != "token-classification":
            return [None] * count
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not say which word a token belongs to: give rows with "
                "`input_ids` and a label for each"
            )
        if not is_split:
            sequence_ids = encoding.sequence_ids() if count else []
            return [None if sequence is None else n for n, sequence in enumerate(sequence_ids)]
        words = encoding.word_ids()
        return [word if word not in words[:n] else None for n, word in enumerate(words)]

    def _encode_labels(self, row: Row, label_indices: Sequence[int | None]) -> list[int] | list[float]:
        """Return the row's one class number or regression number in a list, or one class number per token."""
        column = next((name for name in ("labels", "label") if name in row), None)
        if column is None and self.labels_required:
            raise ValueError(
                f"the row has no `label`, which the loss reads; its columns are {', '.join(sorted(row))}. "
                "Soft targets alone need none: leave out the terms that read labels"
            )
        if self.kind == "token-classification":
            return self._encode_token_labels(row, column, label_indices)
        value = None if column is None else row[column]
        if self.kind == "regression":
            return [self._parse_regression_label(value)]
        return [self._encode_class_label(value)]

    def _encode_token_labels(
        self, row: Row, column: str | None, label_indices: Sequence[int | None]
    ) -> list[int]:
        """Return a class number per token; NOT_TRAINED where none belongs, UNKNOWN_LABEL if it is missing."""
        if column is None:
            return [NOT_TRAINED if index is None else UNKNOWN_LABEL for index in label_indices]
        labels = row[column]
        expected = next((len(row[name]) for name in ("tokens", "input_ids") if name in row), None)
        if expected is None:
            raise ValueError("a label for each token needs the row as `tokens` or `input_ids`, not as `text`")
        if isinstance(labels, str | int) or len(labels) != expected:
            count = "1" if isinstance(labels, str | int) else str(len(labels))
            raise ValueError(f"`{column}` has {count} entries for {expected} tokens: give one for each")
        return [
            NOT_TRAINED if index is None else self._encode_class_label(labels[index])
            for index in label_indices
        ]

    def _encode_class_label(self, value: Any) -> int:
        """Return the number of a class given by name or number; UNKNOWN_LABEL for None, else ValueError."""
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
        """Return the label as a float; NaN for None, ValueError if it is not a finite number."""
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"label {value!r} is no number, and a regression learns numbers")
        return number


@dataclass(frozen=True)
class ClassificationCollator:
    """Encodes rows and collates them into padded tensors by name."""

    encode_row: Callable[[Any], LabelledExample]
    pad_id: int
    kind: ClassifierKind

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        examples = [self.encode_row(row) for row in rows]
        return collate_labelled_rows(examples, self.pad_id, self.kind).named_tensors()


def collate_labelled_rows(rows: Sequence[LabelledExample], pad_id: int, kind: ClassifierKind) -> Sequences:
    """Pad examples on the right into one `Sequences`: texts become the prompts, labels the completions."""
    width = max(len(row.input_ids) for row in rows)
    ids = _pad_id_lists([row.input_ids for row in rows], width, pad_id)
    mask = _pad_id_lists([[1] * len(row.input_ids) for row in rows], width, 0)
    types = None
    if any(row.token_type_ids for row in rows):
        types = _pad_id_lists([row.token_type_ids or [0] * len(row.input_ids) for row in rows], width, 0)
    if kind == "regression":
        labels = torch.tensor([row.labels for row in rows], dtype=torch.float32)
    else:
        max_labels = max(len(row.labels) for row in rows)
        labels = _pad_id_lists([row.labels for row in rows], max_labels, NOT_TRAINED)
    sequences = build_labelled_sequences(ids, mask, labels, types)
    indices = [row.teacher_index for row in rows]
    if max(indices) < 0:
        return sequences
    return replace(sequences, teacher_indices=torch.tensor(indices)[:, None])


def _pad_id_lists(rows: Sequence[Sequence[Any]], width: int, value: int) -> Tensor:
    """Return the rows as an integer tensor, (N, width), each padded on the right with `value`."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def build_labelled_sequences(ids: Tensor, mask: Tensor, labels: Tensor, types: Tensor | None) -> Sequences:
    """Build `Sequences` with labels (N, C) as completions; a NOT_TRAINED label becomes 0 with mask 0."""
    is_trained = labels != NOT_TRAINED
    return Sequences(ids, mask, labels.masked_fill(~is_trained, 0), is_trained.long(), types)


def build_transformers_batch(rows: Sequences, kind: ClassifierKind) -> dict[str, Tensor]:
    """Return a classifier's forward arguments, labels included: (N,) or (N, P), -100 where none counts."""
    labels = rows.completion_ids
    if kind != "regression":
        labels = labels.masked_fill((rows.completion_mask == 0) | (labels == UNKNOWN_LABEL), NOT_TRAINED)
    labels = labels if kind == "token-classification" else labels[:, 0]
    types = {} if rows.token_type_ids is None else {"token_type_ids": rows.token_type_ids}
    return {"input_ids": rows.prompt_ids, "attention_mask": rows.prompt_mask, **types, "labels": labels}
