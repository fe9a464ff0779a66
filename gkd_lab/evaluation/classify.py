"""Labels, tags or numbers of every cell of a pack for the same texts: one forward pass, nothing written."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gkd_lab.metrics.scored_predictions import Prediction
from gkd_lab.models.classifiers import Kind, kind_of, labels_of
from gkd_lab.models.forward import completion_logits, evaluating
from gkd_lab.models.packing import Pack
from gkd_lab.tasks import Row
from gkd_lab.training.classification_adapter import Labelled, collate

ROWS_AT_ONCE = 1024
"""Upper bound of cells x texts in one batch."""
CUT = "-"
"""In the place of a tag that was cut off with its word: it is never right."""
DIGITS = 6
"""Of probabilities and numbers that are stored."""


def classify(
    pack: Pack,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Labelled],
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[Prediction]]:
    """For each cell a prediction for each row, in the rows' order; `progress` hears of rows done.

    The text of a prediction is a label's name, a tag for each word, or a number; beside it stand the
    probabilities of all labels.
    """
    kind, names = kind_of(pack.model), labels_of(pack.model)
    assert kind is not None, "a classifier"
    size = max(1, ROWS_AT_ONCE // pack.size)
    found: list[list[Prediction]] = [[] for _ in range(pack.size)]
    for first in range(0, len(rows), size):
        some = examples[first : first + size]
        batch = collate(some, tokenizer.pad_token_id, kind).to(pack.model.device)
        with torch.no_grad(), evaluating(pack.model):
            logits = completion_logits(pack.model, batch.repeated(pack.size)).float().cpu()
        counts = batch.completion_mask.bool().cpu()
        for cell, of_cell in enumerate(logits.split(len(some))):
            for row, values, kept in zip(rows[first : first + size], of_cell, counts, strict=True):
                found[cell].append(_prediction(row, values[kept], kind, names))
        progress(len(some))
    return found


def _prediction(row: Row, logits: Tensor, kind: Kind, names: Sequence[str]) -> Prediction:
    """logits: (C, V), of what counts alone."""
    if kind == "regression":
        return Prediction(row.prompt, repr(round(float(logits[0, 0]), DIGITS)), row.references, 1, True)
    chosen = [names[n] for n in logits.argmax(-1).tolist()]
    if kind == "token-classification":
        chosen += [CUT] * (len(row.references[0].split()) - len(chosen))
        return Prediction(row.prompt, " ".join(chosen), row.references, len(chosen), True)
    shares = [round(p, DIGITS) for p in logits[0].softmax(-1).tolist()]
    probabilities = dict(zip(names, shares, strict=True))
    return Prediction(row.prompt, chosen[0], row.references, 1, True, probabilities=probabilities)
