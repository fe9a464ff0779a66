"""Labels, tags or numbers of every cell of a pack for the same texts: one forward pass, nothing written."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gkd_lab.metrics.scored_predictions import Prediction
from gkd_lab.models.classifiers import ClassifierKind, get_classifier_kind, list_label_names
from gkd_lab.models.forward import compute_completion_logits, eval_mode
from gkd_lab.models.packing import Pack
from gkd_lab.tasks import Row
from gkd_lab.training.classification_adapter import LabelledExample, collate_labelled_rows

MAX_BATCH_ROWS = 1024
"""Upper bound of cells x texts in one batch."""
TRUNCATED_TAG = "-"
"""In the place of a tag that was cut off with its word: it is never right."""
DIGITS = 6
"""Of probabilities and numbers that are stored."""


def classify_rows(
    pack: Pack,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[LabelledExample],
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[Prediction]]:
    """For each cell a prediction for each row, in the rows' order; `progress` hears of rows done.

    The text of a prediction is a label's name, a tag for each word, or a number; beside it stand the
    probabilities of all labels.
    """
    kind, names = get_classifier_kind(pack.model), list_label_names(pack.model)
    assert kind is not None, "a classifier"
    size = max(1, MAX_BATCH_ROWS // pack.size)
    found: list[list[Prediction]] = [[] for _ in range(pack.size)]
    for first in range(0, len(rows), size):
        some = examples[first : first + size]
        batch = collate_labelled_rows(some, tokenizer.pad_token_id, kind).to(pack.model.device)
        with torch.no_grad(), eval_mode(pack.model):
            logits = compute_completion_logits(pack.model, batch.repeat_rows(pack.size)).float().cpu()
        counts = batch.completion_mask.bool().cpu()
        for cell, of_cell in enumerate(logits.split(len(some))):
            for row, values, kept in zip(rows[first : first + size], of_cell, counts, strict=True):
                found[cell].append(_make_prediction(row, values[kept], kind, names))
        progress(len(some))
    return found


def _make_prediction(row: Row, logits: Tensor, kind: ClassifierKind, names: Sequence[str]) -> Prediction:
    """logits: (C, V), of what counts alone."""
    if kind == "regression":
        return Prediction(row.prompt, repr(round(float(logits[0, 0]), DIGITS)), row.references, 1, True)
    chosen = [names[n] for n in logits.argmax(-1).tolist()]
    if kind == "token-classification":
        chosen += [TRUNCATED_TAG] * (len(row.references[0].split()) - len(chosen))
        return Prediction(row.prompt, " ".join(chosen), row.references, len(chosen), True)
    shares = [round(p, DIGITS) for p in logits[0].softmax(-1).tolist()]
    probabilities = dict(zip(names, shares, strict=True))
    return Prediction(row.prompt, chosen[0], row.references, 1, True, probabilities=probabilities)
