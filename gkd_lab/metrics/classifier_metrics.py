"""Accuracy, F1, Matthews, Pearson and Spearman: scores by scikit-learn and scipy, statistics for resampling.

A resample's score is computed from sums over its examples: counts per label, or moments of numbers.
Shapes: N examples, L labels.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gkd_lab.metrics.score import (
    CORRELATION_METRICS,
    LABEL_METRICS,
    CorpusStatistics,
    MetricInput,
    Score,
)

Floats = NDArray[np.float64]
LabelPairs = Sequence[tuple[str, str]]
"""(predicted, true) labels of one example: one pair, or one per tag."""


def score_labels(rule: str, predicted: ArrayLike, true: ArrayLike, positive: Any = None) -> float:
    """Return one score of all labels (N,) by scikit-learn: 0 to 1, Matthews correlation from -1.

    rule: `accuracy`; `f1_macro`, over labels that occur on either side; `f1_binary`, of the label `positive`
    (None: the last in sorted order, such as 1 of 0 and 1); or `matthews`, 0 where one side is constant.
    Raises ValueError for `f1_binary` of more than two labels, and for no or unequal numbers of labels.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef  # takes 2 s to load

    y_pred, y_true = np.ravel(predicted), np.ravel(true)
    if not len(y_pred) or len(y_pred) != len(y_true):
        raise ValueError(
            f"{len(y_pred)} predictions and {len(y_true)} references: expected equal numbers > 0"
        )
    if rule == "accuracy":
        return float(accuracy_score(y_true, y_pred))
    if rule == "matthews":
        return float(matthews_corrcoef(y_true, y_pred))
    if rule == "f1_macro":
        return float(f1_score(y_true, y_pred, average="macro", zero_division=0))
    labels = np.union1d(y_true, y_pred).tolist()
    _check_binary(labels if positive is None else sorted({*labels, positive}))
    positive = labels[-1] if positive is None else positive
    return float(f1_score(y_true, y_pred, labels=[positive], average=None, zero_division=0)[0])


def correlate(metric: str, predictions: ArrayLike, references: ArrayLike) -> float:
    """Return the `pearson` or `spearman` correlation of numbers (N,), -1 to 1; 0 if a side is constant."""
    from scipy.stats import pearsonr  # takes a second to load

    x, y = _center_numbers(metric, predictions, references)
    return float(pearsonr(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0


def score_texts(metric: str, inputs: MetricInput) -> Score:
    """Return the Score (percent) of texts that are labels, tags or numbers; ValueError for others.

    Per example: the share of its labels that are right; for a correlation, the product of both standard
    scores, whose mean is the correlation.
    """
    if metric in CORRELATION_METRICS:
        numbers = _parse_numbers(inputs)
        value, per_example = correlate(metric, *numbers), _multiply_standard_scores(metric, *numbers)
    else:
        examples = _pair_labels(metric, inputs)
        predicted, true = zip(*chain.from_iterable(examples), strict=True)
        value = score_labels(_get_label_rule(metric), predicted, true)
        per_example = [float(np.mean([label == other for label, other in pairs])) for pairs in examples]
    signature = f"{metric}|rule:gkd-lab-classification-1"
    return Score(100.0 * value, [100.0 * share for share in per_example], signature)


def compute_classification_statistics(metric: str, inputs: MetricInput) -> CorpusStatistics:
    """Return statistics to resample, per example: label counts (N, 3L), or moments (N, 6) of numbers.

    Spearman's ranks are those among all texts, in a resample too.
    """
    if metric in CORRELATION_METRICS:
        x, y = _center_numbers(metric, *_parse_numbers(inputs))
        moments = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
        return CorpusStatistics(moments, lambda summed: 100.0 * _correlate_moments(np.asarray(summed)))
    examples = _pair_labels(metric, inputs)
    labels = sorted({label for pairs in examples for pair in pairs for label in pair})
    rule = _get_label_rule(metric)
    if rule == "f1_binary":
        _check_binary(labels)
    score_counts = _COUNT_SCORES[rule]
    return CorpusStatistics(
        _count_labels(examples, labels),
        lambda summed: 100.0 * score_counts(np.asarray(summed).reshape(3, -1)),
    )


# ---- labels ----


def _get_label_rule(metric: str) -> str:
    """Return the rule of `score_labels` for a metric: its name without `tag_` or `label_`."""
    return metric.removeprefix("tag_").removeprefix("label_")


def _check_binary(labels: Sequence[Any]) -> None:
    """Raise ValueError if there are more than two distinct labels."""
    if len(labels) > 2:
        raise ValueError(
            f"f1_binary needs two labels, and there are {len(labels)}: {', '.join(map(str, labels))}; "
            "choose f1_macro"
        )


def _pair_labels(metric: str, inputs: MetricInput) -> list[LabelPairs]:
    """Return per example its (predicted, true) labels; true is the reference that matches, else the first."""
    pair = _pair_label if metric in LABEL_METRICS else _pair_tags
    return [pair(*example) for example in zip(inputs.predictions, inputs.references, strict=True)]


def _pair_label(prediction: str, references: Sequence[str]) -> LabelPairs:
    """Return [(predicted, true)] of one label; true is the reference that matches, else the first."""
    label, accepted = prediction.strip(), [text.strip() for text in references]
    return [(label, label if label in accepted else accepted[0])]


def _pair_tags(prediction: str, references: Sequence[str]) -> LabelPairs:
    """Return (predicted, true) for each tag of one text; ValueError for unequal numbers of tags."""
    predicted, accepted = prediction.split(), [text.split() for text in references]
    true = predicted if predicted in accepted else accepted[0]
    if not true or len(predicted) != len(true):
        raise ValueError(
            f"tags are compared one by one: there are {len(predicted)} predicted and {len(true)} true tags "
            f"({prediction!r:.60})"
        )
    return list(zip(predicted, true, strict=True))


def _count_labels(examples: Sequence[LabelPairs], labels: Sequence[str]) -> Floats:
    """Return the hits, predictions and true occurrences of each label in each example, (N, 3L)."""
    positions = {label: n for n, label in enumerate(labels)}
    counts = np.zeros((len(examples), 3, len(labels)))
    for n, pairs in enumerate(examples):
        for predicted, true in pairs:
            counts[n, 0, positions[true]] += predicted == true
            counts[n, 1, positions[predicted]] += 1
            counts[n, 2, positions[true]] += 1
    return counts.reshape(len(examples), -1)


def _compute_label_f1(counts: Floats) -> Floats:
    """Return F1 of each label, (L,), from counts (3, L); 0 for a label that does not occur."""
    hits, predicted, true = counts
    return 2 * hits / np.maximum(predicted + true, 1)


def _compute_accuracy(counts: Floats) -> float:
    """Return the share of correct labels, 0 to 1, from counts (3, L)."""
    return float(counts[0].sum() / counts[2].sum())


def _compute_macro_f1(counts: Floats) -> float:
    """Return the mean F1, 0 to 1, of the labels that occur on either side, from counts (3, L)."""
    occurs = counts[1] + counts[2] > 0
    return float(_compute_label_f1(counts)[occurs].mean())


def _compute_binary_f1(counts: Floats) -> float:
    """Return F1, 0 to 1, of the last label from counts (3, L)."""
    return float(_compute_label_f1(counts)[-1])


def _compute_matthews(counts: Floats) -> float:
    """Return Matthews correlation (Gorodkin 2004), -1 to 1, from counts (3, L); 0 if a side is constant."""
    hits, predicted, true = counts
    total = true.sum()
    covariance = hits.sum() * total - predicted @ true
    spread = np.sqrt(total**2 - predicted @ predicted) * np.sqrt(total**2 - true @ true)
    return float(covariance / spread) if spread > 0 else 0.0


_COUNT_SCORES: dict[str, Callable[[Floats], float]] = {
    "accuracy": _compute_accuracy,
    "f1_macro": _compute_macro_f1,
    "f1_binary": _compute_binary_f1,
    "matthews": _compute_matthews,
}

# ---- numbers ----


def _parse_numbers(inputs: MetricInput) -> tuple[Floats, Floats]:
    """Return (predictions, first references) as arrays of numbers (N,); ValueError for other texts."""
    sides = {"predictions": inputs.predictions, "references": [texts[0] for texts in inputs.references]}
    numbers = []
    for side, texts in sides.items():
        try:
            numbers.append(np.array([float(text) for text in texts]))
        except ValueError as error:
            raise ValueError(f"a correlation needs numbers, not such {side}: {error}") from error
    return numbers[0], numbers[1]


def _center_numbers(metric: str, predictions: ArrayLike, references: ArrayLike) -> tuple[Floats, Floats]:
    """Return both sides (N,) minus their means, ranked first for `spearman`. ValueError: under 2, or NaN.

    Sums of squares of centered numbers lose no digits; equal numbers share their mean rank.
    """
    x, y = (np.ravel(side).astype(np.float64) for side in (predictions, references))
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(f"{len(x)} predictions and {len(y)} references: expected 2 of each, or more")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a correlation needs finite numbers: there are NaN or infinite ones")
    if metric == "spearman":
        from scipy.stats import rankdata

        x, y = rankdata(x), rankdata(y)
    return x - x.mean(), y - y.mean()


def _multiply_standard_scores(metric: str, predictions: Floats, references: Floats) -> list[float]:
    """Return the product of both sides' standard scores per example, N numbers; 0 if a side is constant."""
    x, y = _center_numbers(metric, predictions, references)
    if not np.ptp(x) or not np.ptp(y):
        return [0.0] * len(x)
    return (x * y / (x.std() * y.std())).tolist()


def _correlate_moments(total: Floats) -> float:
    """Return the correlation, -1 to 1, from sums of 1, x, y, x^2, y^2, xy; 0 if a side is constant.

    A side that varies by no more than rounding counts as constant.
    """
    n, x, y, xx, yy, xy = total
    squares = np.maximum([xx - x * x / n, yy - y * y / n], 0)
    if (squares <= 1e-12 * np.maximum([xx, yy], 1e-300)).any():
        return 0.0
    return float(np.clip((xy - x * y / n) / (np.sqrt(squares[0]) * np.sqrt(squares[1])), -1, 1))
