"""The package's metrics as `evaluate.Metric` classes, which need no script from the hub and no network.

Bleu().compute(predictions=["ein Haus"], references=[["ein Haus", "das Haus"]])
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from gkd_lab.metrics import score, score_many

_TEXT = datasets.Value("string")
_REFERENCE_FEATURES = [
    datasets.Features({"predictions": _TEXT, "references": datasets.List(_TEXT)}),
    datasets.Features({"predictions": _TEXT, "references": _TEXT}),
]


class TextMetric(evaluate.Metric):
    """Computes any of `gkd_lab.metrics.METRICS` but `self_bleu` together: the value and rates of each.

    TextMetric(["rouge1_stem"]) computes these; the subclasses name metrics that belong together. References
    are one text or a list of texts per example. Examples stay in memory, so a read-only home folder does no
    harm.
    """

    names: tuple[str, ...] = ()

    def __init__(self, names: Sequence[str] = (), **settings: Any) -> None:
        self.names = tuple(names) or type(self).names
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self) -> evaluate.MetricInfo:
        """Return the description of these metrics and of their inputs that `evaluate` asks for."""
        return evaluate.MetricInfo(
            description=f"gkd_lab.metrics: {', '.join(self.names)}, 0 to 100",
            citation="",
            inputs_description="predictions: texts; references: one or more texts for each",
            features=_REFERENCE_FEATURES,
        )

    def _compute(
        self, predictions: list[str], references: list[Any], use_stemmer: bool = False
    ) -> dict[str, Any]:
        """Return one dict: metric name -> value, all rates of the metrics, and `signatures` by metric."""
        texts = [[item] if isinstance(item, str) else list(item) for item in references]
        scores = score_many(self.names, list(predictions), texts, use_stemmer=use_stemmer)
        result: dict[str, Any] = {name: metric.value for name, metric in scores.items()}
        for metric in scores.values():
            result.update(metric.rates)
        result["signatures"] = {name: metric.signature for name, metric in scores.items()}
        return result


class Accuracy(TextMetric):
    """Share of solutions whose answer is right, by the GSM8K rule."""

    names = ("accuracy",)


class ExactMatch(TextMetric):
    """Share of predictions equal to a reference."""

    names = ("exact_match",)


class AccuracyFlexible(TextMetric):
    """Share of solutions whose last number is right, by lm-eval's `flexible-extract` of GSM8K."""

    names = ("accuracy_flexible",)


class Rouge(TextMetric):
    """ROUGE-1, 2, L and Lsum F-measures; `compute(..., use_stemmer=True)` stems words."""

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Bleu(TextMetric):
    """sacreBLEU's corpus BLEU."""

    names = ("bleu",)


class Chrf(TextMetric):
    """sacreBLEU's chrF."""

    names = ("chrf",)


class Labels(TextMetric):
    """Accuracy, macro F1 and Matthews' correlation of labels, -100 to 100."""

    names = ("label_accuracy", "f1_macro", "matthews")


class BinaryF1(TextMetric):
    """F1 score of the second of two labels."""

    names = ("f1_binary",)


class Tags(TextMetric):
    """Accuracy and macro F1 of tags, one per token, separated by spaces."""

    names = ("tag_accuracy", "tag_f1_macro")


class Correlation(TextMetric):
    """Pearson's and Spearman's correlation of numbers given as texts, -100 to 100."""

    names = ("pearson", "spearman")


class SelfBleu(evaluate.Metric):
    """Self-BLEU of several texts per prompt: `compute(predictions=[["a text", "another"], ...])`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self) -> evaluate.MetricInfo:
        """Return the description of the metric and of its inputs that `evaluate` asks for."""
        return evaluate.MetricInfo(
            description="gkd_lab.metrics: self_bleu, 0 (all different) to 100 (all equal)",
            citation="",
            inputs_description="predictions: for each prompt equally many generated texts",
            features=datasets.Features({"predictions": datasets.List(_TEXT)}),
        )

    def _compute(self, predictions: list[list[str]]) -> dict[str, Any]:
        """Return a dict of the `self_bleu` of all prompts' texts, its rates and its signature."""
        texts = [text for group in predictions for text in group]
        prompts = [n for n, group in enumerate(predictions) for _ in group]
        metric = score("self_bleu", texts, [[""]] * len(texts), prompts=prompts)
        return {"self_bleu": metric.value, **metric.rates, "signatures": {"self_bleu": metric.signature}}
