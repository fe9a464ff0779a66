"""Score models on a few rows while they train or when their fine-tuning ends, without storing predictions."""

from collections.abc import Sequence
from typing import Any

import torch

from gkd_lab.config.cell import Evaluation
from gkd_lab.evaluation.classify import classify_rows
from gkd_lab.evaluation.decoding import generate_predictions
from gkd_lab.metrics.text_metrics import Scorer
from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.models.packing import Pack
from gkd_lab.tasks import Row


def score_greedily(
    pack: Pack,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Any],
    max_output_tokens: int,
    metric: str,
) -> list[float]:
    """Return the score of each member of a pack on rows that it decodes greedily, by one metric."""
    evaluation = Evaluation(
        decoding="greedy", split="validation", max_output_tokens=max_output_tokens, metrics=(metric,)
    )
    was_training = pack.model.training
    pack.model.eval()
    with torch.no_grad():
        if get_classifier_kind(pack.model) is None:
            predictions = generate_predictions(pack, tokenizer, rows, examples, evaluation)
        else:
            predictions = classify_rows(pack, tokenizer, rows, examples)
    pack.model.train(was_training)
    scorer = Scorer()
    return [
        scorer.score_many([metric], [text.text for text in texts], [text.references for text in texts])[
            metric
        ].value
        for texts in predictions
    ]
