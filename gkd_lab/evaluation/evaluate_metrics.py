"""Our metrics as `evaluate.Metric`s: no script is fetched from a hub, nothing touches the network.

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
    """Any of `gkd_lab.metrics.METRICS` but `self_bleu`, computed together: each one's value and rates.

    TextMetric(["rouge1_stem"]) computes these; a class below names those that are mostly wanted together.
    References are one text or a list of texts per example. Examples stay in memory, so that a
    read-only home folder does no harm.
    """

    names: tuple[str, ...] = ()

    def __init__(self, names: Sequence[str] = (), **settings: Any) -> None:
        self.names = tuple(names) or type(self).names
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"gkd_lab.metrics: {', '.join(self.names)}, 0 to 100",
            citation="",
            inputs_description="predictions: texts; references: a text or texts for each",
            features=_REFERENCE_FEATURES,
        )

    def _compute(
        self, predictions: list[str], references: list[Any], use_stemmer: bool = False
    ) -> dict[str, Any]:
        texts = [[one] if isinstance(one, str) else list(one) for one in references]
        scores = score_many(self.names, list(predictions), texts, use_stemmer=use_stemmer)
        result: dict[str, Any] = {name: one.value for name, one in scores.items()}
        for one in scores.values():
            result.update(one.rates)
        result["signatures"] = {name: one.signature for name, one in scores.items()}
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
    """F1 of the last of two labels."""

    names = ("f1_binary",)


class Tags(TextMetric):
    """Accuracy and macro F1 of one tag for each token, between blanks."""

    names = ("tag_accuracy", "tag_f1_macro")


class Correlation(TextMetric):
    """Pearson's and Spearman's correlation of texts that are numbers, -100 to 100."""

    names = ("pearson", "spearman")


class SelfBleu(evaluate.Metric):
    """Self-BLEU of several texts a prompt: `compute(predictions=[["a text", "another"], ...])`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="gkd_lab.metrics: self_bleu, 0 (all different) to 100 (all equal)",
            citation="",
            inputs_description="predictions: for each prompt the texts written for it, as many for each",
            features=datasets.Features({"predictions": datasets.List(_TEXT)}),
        )

    def _compute(self, predictions: list[list[str]]) -> dict[str, Any]:
        texts = [text for group in predictions for text in group]
        prompts = [n for n, group in enumerate(predictions) for _ in group]
        one = score("self_bleu", texts, [[""]] * len(texts), prompts=prompts)
        return {"self_bleu": one.value, **one.rates, "signatures": {"self_bleu": one.signature}}
