"""Classify texts by every cell of a pack: labels, tags or numbers from one forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gkd_lab.encoding.labelled_rows import LabelledExample, collate_labelled_rows
from gkd_lab.metrics.scored_predictions import Prediction
from gkd_lab.models.classifiers import ClassifierKind, get_classifier_kind, list_label_names
from gkd_lab.models.forward import compute_completion_logits, eval_mode
from gkd_lab.models.packing import Pack
from gkd_lab.tasks import Row

MAX_BATCH_ROWS = 1024
"""Most cells x texts in one batch."""
TRUNCATED_TAG = "-"
"""Prediction for a word that was truncated, which is always wrong."""
DIGITS = 6
"""Decimal places of stored probabilities and numbers."""


def classify_rows(
    pack: Pack,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[LabelledExample],
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[Prediction]]:
    """Classify every row by every cell; return one list per cell with a `Prediction` per row, in order.

    The text of a prediction is a label's name, a tag for each word, or a number; a label comes with the
    probabilities of all labels. `progress` is called after each batch with its number of rows.
    """
    kind, label_names = get_classifier_kind(pack.model), list_label_names(pack.model)
    assert kind is not None, "a classifier"
    size = max(1, MAX_BATCH_ROWS // pack.size)
    predictions: list[list[Prediction]] = [[] for _ in range(pack.size)]
    for start in range(0, len(rows), size):
        batch_rows, batch_examples = rows[start : start + size], examples[start : start + size]
        batch = collate_labelled_rows(batch_examples, tokenizer.pad_token_id, kind).to(pack.model.device)
        with torch.no_grad(), eval_mode(pack.model):
            logits = compute_completion_logits(pack.model, batch.repeat_rows(pack.size)).float().cpu()
        masks = batch.completion_mask.bool().cpu()
        for cell, cell_logits in enumerate(logits.split(len(batch_rows))):
            predictions[cell] += [
                _make_prediction(row, row_logits[mask], kind, label_names)
                for row, row_logits, mask in zip(batch_rows, cell_logits, masks, strict=True)
            ]
        progress(len(batch_rows))
    return predictions


def _make_prediction(
    row: Row, logits: Tensor, kind: ClassifierKind, label_names: Sequence[str]
) -> Prediction:
    """Return the `Prediction` (label name, tags or number as text) of one row's label logits, (C, V)."""
    if kind == "regression":
        return Prediction(row.prompt, repr(round(float(logits[0, 0]), DIGITS)), row.references, 1, True)
    labels = [label_names[n] for n in logits.argmax(-1).tolist()]
    if kind == "token-classification":
        labels += [TRUNCATED_TAG] * (len(row.references[0].split()) - len(labels))
        return Prediction(row.prompt, " ".join(labels), row.references, len(labels), True)
    rounded = [round(p, DIGITS) for p in logits[0].softmax(-1).tolist()]
    probabilities = dict(zip(label_names, rounded, strict=True))
    return Prediction(row.prompt, labels[0], row.references, 1, True, probabilities=probabilities)
