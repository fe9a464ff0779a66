"""One evaluation's verdict: predictions against references, every score with its interval and signature.

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
    """What a model wrote for one prompt."""

    prompt: str
    text: str
    references: tuple[str, ...]
    tokens: int
    ended: bool
    """Whether it wrote the end of sequence before the limit."""
    sample: int = 0
    """Which of the prompt's texts it is; they follow one another, and the next prompt's start at 0 again."""
    probabilities: Mapping[str, float] | None = None
    """Of a classifier: of each label."""


_REQUIRED_FIELDS: dict[str, type] = {
    "prompt": str,
    "prediction": str,
    "references": list,
    "tokens": int,
    "ended": bool,
}


def parse_prediction(row: Mapping[str, Any]) -> Prediction:
    """A stored row as what it was made from. ValueError names what is missing or of another kind."""
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
    """(scores, rows): metric -> value, 95 % interval over examples, n, signature; and a row an example.

    Beside the metrics: `mean_length` in tokens, `eos_rate`, the share with an end of sequence, and
    `truncated`, the share without. One `scorer` for many cells computes once what they share. Of several
    texts a prompt each is an example; their intervals draw prompts, and corpus scores have none, as
    sacreBLEU's bootstrap would take the texts of one prompt for independent.
    """
    texts = [prediction.text for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    prompts = list(accumulate(prediction.sample == 0 for prediction in predictions))
    found = (scorer or Scorer()).score_many(metrics, texts, references, prompts=prompts)
    samples = _count_samples_per_prompt(prompts)
    scores: dict[str, dict[str, Any]] = {}
    for name, score in found.items():
        ends = compute_interval(name, texts, references, score.per_example, samples_per_prompt=samples)
        bounds = {} if ends is None else {"low": ends[0], "high": ends[1]}
        scores[name] = {"value": score.value, **bounds, "n": len(texts), "signature": score.signature}
        for rate, value in score.rates.items():
            scores[rate] = {"value": value}
    scores["mean_length"] = {"value": fmean(prediction.tokens for prediction in predictions)}
    scores["eos_rate"] = {"value": fmean(prediction.ended for prediction in predictions)}
    scores["truncated"] = {"value": fmean(not prediction.ended for prediction in predictions)}
    return scores, _build_prediction_rows(predictions, found, include_sample=samples > 1)


def _count_samples_per_prompt(prompts: Sequence[int]) -> int:
    counts = set(Counter(prompts).values())
    if len(counts) > 1:
        raise ValueError(
            f"every prompt needs as many texts: there are from {min(counts)} to {max(counts)} of one prompt"
        )
    return counts.pop()


def _build_prediction_rows(
    predictions: Sequence[Prediction], scores: Mapping[str, Score], include_sample: bool
) -> list[dict[str, Any]]:
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
