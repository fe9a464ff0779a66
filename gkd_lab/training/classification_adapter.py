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

from gkd_lab.config.errors import nearest
from gkd_lab.encoding.batches import Cut
from gkd_lab.encoding.row_encoder import route_of
from gkd_lab.encoding.trl_batch import NOT_TRAINED, is_collated_here
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.squared_error import SquaredError
from gkd_lab.losses.terms import CrossEntropy, LabelError, Term
from gkd_lab.metrics import classifier_metrics as scores
from gkd_lab.models.classifiers import Kind, check_pair, kind_of, labels_of, name_padding, teacher_columns
from gkd_lab.models.forward import Sequences, completion_logits, unwrapped
from gkd_lab.teachers.teacher import LiveTeacher, Teaching
from gkd_lab.training.arguments import GKDConfig

Row = Mapping[str, Any]
UNKNOWN = -1
"""In the place of a label that no term reads: the position counts, and no metric does."""
FORMS = """\
  `text`, with or without `text_pair`
  `tokens`: the words of a text, split
  `input_ids`, with or without `attention_mask` and `token_type_ids`"""


@dataclass(frozen=True)
class Labelled:
    """Ids of one row, and its labels: one, or one for each token; of a regression a number.

    Labels are NOT_TRAINED where nothing counts, and UNKNOWN (of a regression NaN) where none was given.
    route: the number of the teacher that the row is meant for; -1: of any.
    """

    input_ids: list[int]
    labels: list[int] | list[float]
    token_type_ids: list[int] | None = None
    route: int = -1

    def first(self, count: int) -> "Labelled":
        """Cut after so many tokens."""
        labels = self.labels[:count] if len(self.labels) == len(self.input_ids) else self.labels
        types = None if self.token_type_ids is None else self.token_type_ids[:count]
        return replace(self, input_ids=self.input_ids[:count], labels=labels, token_type_ids=types)

    @property
    def prompt_ids(self) -> list[int]:
        """What the model reads, as an `Example` calls it."""
        return self.input_ids

    @property
    def completion_ids(self) -> Sequence[float]:
        """What is trained on, one position a label."""
        return self.labels


def labelled(
    tokenizer: Any,
    kind: Kind,
    names: Sequence[str],
    rows: Sequence[tuple[str, str]],
    *,
    max_input_tokens: int,
) -> tuple[list[Labelled], Cut]:
    """(text, target) pairs as ids; a target is a label's name, a tag for each word, or a number."""
    encode = LabelledRows(tokenizer, kind, names, max_length=None, needed=True)
    whole = [encode(_as_row(kind, text, target)) for text, target in rows]
    cut = Cut(
        rows=len(rows), prompts=sum(len(row.input_ids) > max_input_tokens for row in whole), completions=0
    )
    return [row.first(max_input_tokens) for row in whole], cut


def _as_row(kind: Kind, text: str, target: str) -> Row:
    if kind == "token-classification":
        return {"tokens": text.split(), "labels": target.split()}
    return {"text": text, "label": float(target) if kind == "regression" else target}


class LabelledRows:
    """Turns a row of a user's data set into a `Labelled`, cut after `max_length` tokens.

    A label is its number or its name. Of `tokens` the first piece of a word has the word's label and its
    other pieces none. `label` and `labels` are the same column. Without `needed` it may be missing: soft
    targets read none.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: Kind,
        names: Sequence[str],
        *,
        max_length: int | None,
        needed: bool,
        formatting_func: Callable[[Row], Row] | None = None,
    ) -> None:
        self.tokenizer, self.kind, self.names = tokenizer, kind, tuple(names)
        limits = [limit for limit in (max_length, tokenizer.model_max_length) if limit is not None]
        self.max_length, self.needed = min(limits), needed
        self.formatting_func = formatting_func

    def __call__(self, row: Row | Labelled) -> Labelled:
        """The row as ids. ValueError: it has no known form, or a label that is none of the model's."""
        if isinstance(row, Labelled):
            return row
        row = row if self.formatting_func is None else self.formatting_func(row)
        row = {column: value for column, value in row.items() if value is not None}
        ids, types, words = self._read(row)
        ids, words = ids[: self.max_length], words[: self.max_length]
        if not ids:
            raise ValueError("the row's text is empty: there is nothing to classify")
        types = None if types is None else types[: self.max_length]
        return Labelled(ids, self._labels(row, words), types, route_of(row))

    def _read(self, row: Row) -> tuple[list[int], list[int] | None, list[int | None]]:
        """Ids, which text of a pair each belongs to, and which of the row's labels; None: none."""
        if "input_ids" in row:
            ids = [int(i) for i in row["input_ids"]]
            kept = [n for n, real in enumerate(row.get("attention_mask", [1] * len(ids))) if real]
            types = row.get("token_type_ids")
            return [ids[n] for n in kept], types and [int(types[n]) for n in kept], list(kept)
        if "tokens" not in row and "text" not in row:
            raise ValueError(
                f"no text can be read from a row with the columns {sorted(row)}; known:\n{FORMS}"
            )
        split = "tokens" in row
        texts = [list(row["tokens"])] if split else [row[c] for c in ("text", "text_pair") if c in row]
        read = self.tokenizer(
            *texts, is_split_into_words=split, truncation=True, max_length=min(self.max_length, 2**31)
        )
        ids = read["input_ids"]
        return ids, read.get("token_type_ids"), self._words(read, split, len(ids))

    def _words(self, read: Any, split: bool, count: int) -> list[int | None]:
        if self.kind != "token-classification":
            return [None] * count
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not say which word a token belongs to: give rows with "
                "`input_ids` and a label for each"
            )
        if not split:
            return [None if mask else n for n, mask in enumerate(_special(read, count))]
        words = read.word_ids()
        return [word if word not in words[:n] else None for n, word in enumerate(words)]

    def _labels(self, row: Row, words: Sequence[int | None]) -> list[int] | list[float]:
        column = next((name for name in ("labels", "label") if name in row), None)
        if column is None and self.needed:
            raise ValueError(
                f"the row has no `label`, which the loss reads; its columns are {', '.join(sorted(row))}. "
                "Soft targets alone need none: leave out the terms that read labels"
            )
        if self.kind == "token-classification":
            return self._of_tokens(row, column, words)
        value = None if column is None else row[column]
        return [self._number(value)] if self.kind == "regression" else [self._label(value)]

    def _of_tokens(self, row: Row, column: str | None, words: Sequence[int | None]) -> list[int]:
        if column is None:
            return [NOT_TRAINED if word is None else UNKNOWN for word in words]
        given = row[column]
        expected = next((len(row[name]) for name in ("tokens", "input_ids") if name in row), None)
        if expected is None:
            raise ValueError("a label for each token needs the row as `tokens` or `input_ids`, not as `text`")
        if isinstance(given, str | int) or len(given) != expected:
            found = "1" if isinstance(given, str | int) else str(len(given))
            raise ValueError(f"`{column}` has {found} entries for {expected} tokens: give one for each")
        return [NOT_TRAINED if word is None else self._label(given[word]) for word in words]

    def _label(self, value: Any) -> int:
        """A label's number."""
        if value is None:
            return UNKNOWN
        if isinstance(value, str):
            if value not in self.names:
                raise ValueError(f"label {value!r} is none of the model's; {nearest(value, self.names)}")
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

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"label {value!r} is no number, and a regression learns numbers")
        return number


def _special(read: Any, count: int) -> list[bool]:
    """Which of the ids the tokenizer added itself."""
    return [sequence is None for sequence in (read.sequence_ids() if count else [])]


@dataclass(frozen=True)
class LabelCollator:
    """Rows as tensors by name, padded on the right."""

    encode: Callable[[Any], Labelled]
    pad_id: int
    kind: Kind

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        return collate([self.encode(row) for row in rows], self.pad_id, self.kind).tensors()


def collate(rows: Sequence[Labelled], pad_id: int, kind: Kind) -> Sequences:
    """Rows as `Sequences`: the text is the prompt, its labels are the completion."""
    width = max(len(row.input_ids) for row in rows)
    ids = _padded([row.input_ids for row in rows], width, pad_id)
    mask = _padded([[1] * len(row.input_ids) for row in rows], width, 0)
    types = None
    if any(row.token_type_ids for row in rows):
        types = _padded([row.token_type_ids or [0] * len(row.input_ids) for row in rows], width, 0)
    if kind == "regression":
        labels = torch.tensor([row.labels for row in rows], dtype=torch.float32)
    else:
        longest = max(len(row.labels) for row in rows)
        labels = _padded([row.labels for row in rows], longest, NOT_TRAINED)
    found = _with_labels(ids, mask, labels, types)
    routes = [row.route for row in rows]
    return replace(found, routes=torch.tensor(routes)[:, None]) if max(routes) >= 0 else found


def _padded(rows: Sequence[Sequence[Any]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def _with_labels(ids: Tensor, mask: Tensor, labels: Tensor, types: Tensor | None) -> Sequences:
    """labels: (N, C). What does not count is a label 0 of a position that is not trained."""
    counts = labels != NOT_TRAINED
    return Sequences(ids, mask, labels.masked_fill(~counts, 0), counts.long(), types)


def in_form_of_transformers(rows: Sequences, kind: Kind) -> dict[str, Tensor]:
    """What a classifier's own forward takes; labels are -100 where none counts. (N,), of tokens (N, P)."""
    labels = rows.completion_ids
    if kind != "regression":
        labels = labels.masked_fill((rows.completion_mask == 0) | (labels == UNKNOWN), NOT_TRAINED)
    labels = labels if kind == "token-classification" else labels[:, 0]
    types = {} if rows.token_type_ids is None else {"token_type_ids": rows.token_type_ids}
    return {"input_ids": rows.prompt_ids, "attention_mask": rows.prompt_mask, **types, "labels": labels}


class Classification:
    """What the trainer does in another way for a pair of classifiers than for language models.

    Raises:
        ValueError: for a pair with other labels or ids, and for arguments that let a classifier write.
    """

    def __init__(
        self,
        kind: Kind,
        student: PreTrainedModel,
        teachers: Sequence[tuple[PreTrainedModel, Any]],
        tokenizer: Any,
        args: GKDConfig,
    ) -> None:
        self.kind, self.tokenizer = kind, tokenizer
        self.names = labels_of(student)
        for teacher, own in teachers:
            check_pair(student, teacher, tokenizer, own)
        self.columns = [teacher_columns(student, teacher, kind) for teacher, _ in teachers]
        for model in (student, *(teacher for teacher, _ in teachers)):
            name_padding(model, tokenizer.pad_token_id)
        for name in ("seq_kd", "use_vllm", "eval_on_policy"):
            if getattr(args, name):
                raise ValueError(f"{name}=True lets a model write, and {_a(kind)} model writes nothing")

    def align(self, teachers: Sequence[Teaching]) -> None:
        """Have each teacher, in the order of the pairs, name its labels in the student's order."""
        for teacher, columns in zip(teachers, self.columns, strict=True):
            if isinstance(teacher, LiveTeacher):
                teacher.head.columns = columns

    def cells(self, cells: Sequence[CellArguments]) -> list[CellArguments]:
        """The same with what a regression learns by default; ValueError for what does not fit."""
        return [self._checked(cell) for cell in cells]

    def _checked(self, cell: CellArguments) -> CellArguments:
        if cell.lmbda > 0:
            raise ValueError(
                f"lmbda={cell.lmbda:g} lets the student write its own text, and {_a(self.kind)} model writes "
                "nothing: set lmbda=0"
            )
        if not cell.objectives and self.kind == "regression":
            cell = replace(cell, objectives=(Term(SquaredError()),))
        for term in cell.terms():
            self._check(term)
        return cell

    def _check(self, term: Term) -> None:
        numeric = self.kind == "regression"
        if not isinstance(term.measure, Divergence | CrossEntropy | SquaredError | LabelError):
            raise ValueError(f"objectives: {term.name} reads what only a language model has; leave it out")
        if numeric and isinstance(term.measure, Divergence | CrossEntropy):
            raise ValueError(
                f"objectives: {term.name} compares distributions, and a regression has one number: choose "
                "{'type': 'squared_error'}, against the teacher or, with 'against': 'labels', the data"
            )
        if not numeric and isinstance(term.measure, LabelError):
            raise ValueError(
                "objectives: squared_error against labels needs numbers: of classes choose cross_entropy"
            )

    def collator(
        self, cells: Sequence[CellArguments], args: GKDConfig, formatting_func: Callable[[Row], Row] | None
    ) -> LabelCollator:
        """Rows to tensors; labels may be missing where no cell's loss reads them."""
        needed = any(term.reads_labels for cell in cells for term in cell.terms())
        encode = LabelledRows(
            self.tokenizer,
            self.kind,
            self.names,
            max_length=args.max_length,
            needed=needed,
            formatting_func=formatting_func,
        )
        return LabelCollator(encode, self.tokenizer.pad_token_id, self.kind)

    def sequences(self, batch: Mapping[str, Any]) -> Sequences:
        """A collated batch, by our collator or by one of transformers'. ValueError: it is neither."""
        if is_collated_here(batch):
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
        return _with_labels(batch["input_ids"], batch["attention_mask"], labels, batch.get("token_type_ids"))

    def logits_and_labels(self, model: Any, fixed: Sequences) -> tuple[Tensor, Tensor]:
        """What `compute_metrics` gets, as from transformers' Trainer: labels are -100 where none counts.

        (N, V) and (N,); of tokens (N, P, V) and (N, P).
        """
        logits = completion_logits(model, fixed)
        labels = in_form_of_transformers(fixed, self.kind)["labels"]
        return logits if self.kind == "token-classification" else logits[:, 0], labels

    @property
    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Metrics of an evaluation where the user gives none."""
        return partial(measured, kind=self.kind, labels=len(self.names))


def classification_of(
    student: PreTrainedModel,
    teachers: Sequence[tuple[PreTrainedModel, Any]],
    tokenizer: Any,
    args: GKDConfig,
    *,
    unstated: bool = False,
) -> Classification | None:
    """None: these are language models. teachers: with the tokenizer of each, or None.

    With `unstated` arguments a classifier has `lmbda=0`, the only one it can have.
    """
    kind = kind_of(unwrapped(student))
    if kind is None:
        return None
    if unstated:
        args.lmbda = 0.0
    bare = [(unwrapped(teacher), own) for teacher, own in teachers]
    return Classification(kind, unwrapped(student), bare, tokenizer, args)


def measured(evaluated: EvalPrediction, *, kind: Kind, labels: int) -> dict[str, float]:
    """Accuracy, macro F1, of two labels also F1 of the second, and Matthews' correlation; of a regression
    Pearson's and Spearman's. 0 to 1, correlations from -1; nothing where no row has a label.
    """
    found, true = np.asarray(evaluated.predictions), np.asarray(evaluated.label_ids)
    if kind == "regression":
        known = np.isfinite(true)
        x, y = found.reshape(-1)[known], true[known]
        if len(y) < 2:
            return {}
        return {"pearson": scores.pearson(x, y), "spearman": scores.spearman(x, y)}
    known = true != NOT_TRAINED
    x, y = found.argmax(-1)[known], true[known]
    if not len(y):
        return {}
    values = {"accuracy": scores.accuracy(x, y), "f1_macro": scores.f1_macro(x, y)}
    if labels == 2:
        values["f1"] = scores.f1_binary(x, y, positive=1)
    return {**values, "matthews": scores.matthews(x, y)}


def _a(kind: Kind) -> str:
    return f"a {kind}"
