"""Scores of one evaluation: every metric with its interval and signature, and a row per prediction.

Pure functions over strings, so that a metric can be recomputed from stored predictions without torch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from gkd_lab.metrics.intervals import compute_interval
from gkd_lab.metrics.text_metrics import Score, Scorer


@dataclass(frozen=True)
class Prediction:
    """A text that a model generated for one prompt, with its references."""

    prompt: str
    text: str
    references: tuple[str, ...]
    tokens: int
    ended: bool
    """True if the model generated the end of sequence before the token limit."""
    sample: int = 0
    """Number of the sample of its prompt, from 0; samples of one prompt follow one another."""
    probabilities: Mapping[str, float] | None = None
    """Probability of each label; None for a language model."""


_REQUIRED_FIELDS: dict[str, type] = {
    "prompt": str,
    "prediction": str,
    "references": list,
    "tokens": int,
    "ended": bool,
}


def parse_prediction(row: Mapping[str, Any]) -> Prediction:
    """Return a row of predictions.jsonl as a Prediction. ValueError: a field is missing or mistyped."""
    for name, kind in _REQUIRED_FIELDS.items():
        if name not in row:
            raise ValueError(f"no field {name!r}; the fields there are: {', '.join(map(str, row))}")
        if not isinstance(row[name], kind):
            raise ValueError(f"field {name!r} must be {kind.__name__}, got {row[name]!r:.60}")
    texts = tuple(row["references"])
    return Prediction(
        row["prompt"], row["prediction"], texts, row["tokens"], row["ended"], row.get("sample", 0)
    )


def score_predictions(
    metrics: Sequence[str], predictions: Sequence[Prediction], scorer: Scorer | None = None
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return (metric -> value, interval, n, signature; one row of predictions.jsonl per prediction).

    Intervals are at 95 % over examples. Beside the metrics: `mean_length` in tokens, `eos_rate`, the share
    with an end of sequence, and `truncated`, the share without. One `scorer` for many cells processes shared
    texts once. With several samples per prompt each sample is an example; intervals of means draw prompts,
    and corpus scores have no interval, as sacreBLEU's bootstrap would take the samples of one prompt as
    independent.
    """
    texts = [prediction.text for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    prompts = list(accumulate(prediction.sample == 0 for prediction in predictions))
    metric_scores = (scorer or Scorer()).score_many(metrics, texts, references, prompts=prompts)
    samples = _count_samples_per_prompt(prompts)
    scores: dict[str, dict[str, Any]] = {}
    for name, score in metric_scores.items():
        ends = compute_interval(name, texts, references, score.per_example, samples_per_prompt=samples)
        bounds = {} if ends is None else {"low": ends[0], "high": ends[1]}
        scores[name] = {"value": score.value, **bounds, "n": len(texts), "signature": score.signature}
        for rate, value in score.rates.items():
            scores[rate] = {"value": value}
    scores["mean_length"] = {"value": fmean(prediction.tokens for prediction in predictions)}
    scores["eos_rate"] = {"value": fmean(prediction.ended for prediction in predictions)}
    scores["truncated"] = {"value": fmean(not prediction.ended for prediction in predictions)}
    return scores, _build_prediction_rows(predictions, metric_scores, include_sample=samples > 1)


def _count_samples_per_prompt(prompts: Sequence[int]) -> int:
    """Return the number of samples that every prompt has, from prompt numbers. ValueError: it varies."""
    counts = set(Counter(prompts).values())
    if len(counts) > 1:
        raise ValueError(
            f"every prompt needs as many texts: there are from {min(counts)} to {max(counts)} of one prompt"
        )
    return counts.pop()


def _build_prediction_rows(
    predictions: Sequence[Prediction], scores: Mapping[str, Score], include_sample: bool
) -> list[dict[str, Any]]:
    """Return one row of predictions.jsonl per prediction, with its own score by each metric."""
    return [
        {
            "prompt": prediction.prompt,
            **({"sample": prediction.sample} if include_sample else {}),
            "prediction": prediction.text,
            "references": list(prediction.references),
            "tokens": prediction.tokens,
            "ended": prediction.ended,
            **({} if prediction.probabilities is None else {"probabilities": prediction.probabilities}),
            "scores": {name: score.per_example[n] for name, score in scores.items()},
        }
        for n, prediction in enumerate(predictions)
    ]
