"""One evaluation's verdict: predictions against references, every score with its interval and signature.

Pure functions over strings, so that a metric can be recomputed from stored predictions without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gkd_lab.metrics.intervals import interval
from gkd_lab.metrics.score import score_many


@dataclass(frozen=True)
class Prediction:
    """What a model wrote for one prompt."""

    prompt: str
    text: str
    references: tuple[str, ...]
    tokens: int
    ended: bool
    """Whether it wrote the end of sequence before the limit."""


def judge(
    metrics: Sequence[str], predictions: Sequence[Prediction]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(scores, rows): metric -> value, 95 % interval over examples, n, signature; and a row an example.

    Beside the metrics: `mean_length` in tokens and `truncated`, the share without an end of sequence.
    """
    texts = [prediction.text for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    scores: dict[str, dict[str, Any]] = {}
    per_example: dict[str, list[float]] = {}
    for name, score in score_many(metrics, texts, references).items():
        low, high = interval(name, texts, references, score.per_example)
        scores[name] = {
            "value": score.value,
            "low": low,
            "high": high,
            "n": len(texts),
            "signature": score.signature,
        }
        per_example[name] = score.per_example
        for rate, value in score.extra.items():
            scores[rate] = {"value": value}
    scores["mean_length"] = {"value": fmean(prediction.tokens for prediction in predictions)}
    scores["truncated"] = {"value": fmean(not prediction.ended for prediction in predictions)}
    rows = [
        {
            "prompt": prediction.prompt,
            "prediction": prediction.text,
            "references": list(prediction.references),
            "tokens": prediction.tokens,
            "ended": prediction.ended,
            "scores": {name: values[n] for name, values in per_example.items()},
        }
        for n, prediction in enumerate(predictions)
    ]
    return scores, rows
