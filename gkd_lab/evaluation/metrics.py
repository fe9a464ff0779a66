"""Our metrics as `evaluate.Metric`s: no script is fetched from a hub, nothing touches the network.

Bleu().compute(predictions=["ein Haus"], references=[["ein Haus", "das Haus"]])
"""

from typing import Any

import datasets
import evaluate

from gkd_lab.metrics import METRICS, score_many

_TEXT = datasets.Value("string")
_EITHER_FORM = [
    datasets.Features({"predictions": _TEXT, "references": datasets.List(_TEXT)}),
    datasets.Features({"predictions": _TEXT, "references": _TEXT}),
]


class TextMetric(evaluate.Metric):
    """The metrics in `names`, computed together; `compute` gives each one's value and extras.

    References are one text or a list of texts per example. Examples stay in memory, so that a
    read-only home folder does no harm.
    """

    names: tuple[str, ...]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"gkd_lab.metrics: {', '.join(self.names)}, 0 to 100",
            citation="",
            inputs_description="predictions: texts; references: a text or texts for each",
            features=_EITHER_FORM,
        )

    def _compute(
        self, predictions: list[str], references: list[Any], use_stemmer: bool = False
    ) -> dict[str, Any]:
        texts = [[one] if isinstance(one, str) else list(one) for one in references]
        scores = score_many(self.names, list(predictions), texts, use_stemmer=use_stemmer)
        result: dict[str, Any] = {name: one.value for name, one in scores.items()}
        for one in scores.values():
            result.update(one.extra)
        result["signatures"] = {name: one.signature for name, one in scores.items()}
        return result


class Accuracy(TextMetric):
    """Share of solutions whose answer is right, by the GSM8K rule."""

    names = ("accuracy",)


class ExactMatch(TextMetric):
    """Share of predictions equal to a reference."""

    names = ("exact_match",)


class Rouge(TextMetric):
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures; `compute(..., use_stemmer=True)` stems words."""

    names = ("rouge1", "rouge2", "rougeL")


class Bleu(TextMetric):
    """sacreBLEU's corpus BLEU."""

    names = ("bleu",)


class Chrf(TextMetric):
    """sacreBLEU's chrF."""

    names = ("chrf",)


assert {name for metric in TextMetric.__subclasses__() for name in metric.names} == set(METRICS)
