"""Accuracy, F1, Matthews and Pearson or Spearman correlation, each a function of sums over examples.

An example counts, for every label, whether it was hit, predicted and there; a correlation counts moments. So
a resample's score needs the sums alone. Shapes: N examples, L labels.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gkd_lab.metrics.classifier_metric_names import CORRELATION_METRICS, LABEL_METRICS

Floats = NDArray[np.float64]
LabelPairs = Sequence[tuple[str, str]]
"""(predicted, true) labels."""


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of equal labels, 0 to 1. Both (N,), of any one type; ValueError: no labels, or unequal counts."""
    return _score_labels("accuracy", predictions, references)


def f1_macro(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean over labels of F1, 0 to 1, over those that are predicted or there (scikit-learn's `macro`)."""
    return _score_labels("f1_macro", predictions, references)


def f1_binary(predictions: ArrayLike, references: ArrayLike, positive: Any = None) -> float:
    """F1 of the label `positive`, 0 to 1; None: the last in order, such as 1 of 0 and 1.

    Raises:
        ValueError: if there are more than two labels.
    """
    return _score_labels("f1_binary", predictions, references, positive)


def matthews(predictions: ArrayLike, references: ArrayLike) -> float:
    """Matthews' correlation of any number of labels (Gorodkin 2004), -1 to 1; 0 if one side is constant."""
    return _score_labels("matthews", predictions, references)


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson's correlation of two lists of numbers, -1 to 1; 0 where one of them is constant."""
    x, y = _center_numbers(predictions, references)
    return _compute_correlation(_compute_moments(x, y).sum(0))


def spearman(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson's correlation of the ranks; equal numbers share their mean rank."""
    x, y = _center_numbers(predictions, references)
    return _compute_correlation(_compute_moments(_rank_numbers(x), _rank_numbers(y)).sum(0))


def compute_statistics(
    metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Floats, Callable[[Sequence[float]], float]]:
    """What each text counts, (N, K), and the score of such counts summed, -100 to 100.

    Spearman's ranks are those among all texts, in a resample too. Of several references the first counts
    that is equal, else the first. Raises ValueError for texts that are no labels, tags or numbers.
    """
    if metric in CORRELATION_METRICS:
        x, y = _center_numbers(
            _parse_numbers(predictions, "predictions"),
            _parse_numbers([r[0] for r in references], "references"),
        )
        moments = (
            _compute_moments(x, y)
            if metric == "pearson"
            else _compute_moments(_rank_numbers(x), _rank_numbers(y))
        )
        return moments, lambda row: 100.0 * _compute_correlation(np.asarray(row))
    pairs = [_pair_labels(metric, *pair) for pair in zip(predictions, references, strict=True)]
    labels = sorted({label for example in pairs for pair in example for label in pair})
    rule = _get_count_score(metric.removeprefix("tag_").removeprefix("label_"), labels)
    return _count_labels_per_text(pairs, labels), lambda row: 100.0 * rule(np.asarray(row).reshape(3, -1))


def score_texts(metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """A value for each text, 0 to 100: the share of it that is right.

    Of a correlation it is 100 times the product of both sides' standard scores: the mean is the correlation.
    """
    if metric not in CORRELATION_METRICS:
        pairs = [_pair_labels(metric, *pair) for pair in zip(predictions, references, strict=True)]
        return [100.0 * float(np.mean([one == other for one, other in example])) for example in pairs]
    moments, _ = compute_statistics(metric, predictions, references)
    total = moments.sum(0)
    n, spread = total[0], _compute_spread(total)
    means = total[1:3] / n
    products = (moments[:, 1] - means[0]) * (moments[:, 2] - means[1])
    return (100.0 * n * products / spread).tolist() if spread > 0 else [0.0] * int(n)


def bootstrap_interval(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    resample_counts: Iterable[Floats],
) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the score of resamples; draws: (R, N) times each text is drawn."""
    counted, score = compute_statistics(metric, predictions, references)
    found = [score(row) for counts in resample_counts for row in (counts @ counted).tolist()]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


# ---- labels ----


def _score_labels(rule: str, predictions: ArrayLike, references: ArrayLike, positive: Any = None) -> float:
    found, true = np.ravel(predictions), np.ravel(references)
    if not len(found) or len(found) != len(true):
        raise ValueError(
            f"{len(found)} predictions and {len(true)} references: give as many, and one at least"
        )
    labels, numbers = np.unique(np.concatenate([found, true]), return_inverse=True)
    if positive is not None:
        if rule == "f1_binary" and len(set(labels.tolist()) | {positive}) > 2:
            _get_count_score(rule, labels.tolist())
        return float(_compute_label_f1(_count_labels(numbers == np.searchsorted(labels, positive), 2))[1])
    return _get_count_score(rule, labels.tolist())(_count_labels(numbers, len(labels)))


def _count_labels(numbers: NDArray[Any], labels: int) -> Floats:
    """Hits, predictions and occurrences of each label, (3, L), from the numbers of both, (2N,)."""
    found, true = np.split(numbers.astype(np.intp), 2)
    parts = (found[found == true], found, true)
    return np.array([np.bincount(part, minlength=labels) for part in parts], dtype=np.float64)


def _pair_labels(metric: str, prediction: str, references: Sequence[str]) -> LabelPairs:
    if metric in LABEL_METRICS:
        found, accepted = prediction.strip(), [text.strip() for text in references]
        return [(found, found if found in accepted else accepted[0])]
    accepted = [" ".join(text.split()) for text in references]
    tags = prediction.split()
    true = (" ".join(tags) if " ".join(tags) in accepted else accepted[0]).split()
    if not true or len(tags) != len(true):
        raise ValueError(
            f"{metric} compares tags one by one: there are {len(tags)} predicted and {len(true)} true ones "
            f"({prediction!r:.60})"
        )
    return list(zip(tags, true, strict=True))


def _count_labels_per_text(examples: Sequence[LabelPairs], labels: Sequence[str]) -> Floats:
    """Hits, predictions and occurrences of each label in each example, (N, 3L)."""
    number = {label: n for n, label in enumerate(labels)}
    counts = np.zeros((len(examples), 3, len(labels)))
    for n, example in enumerate(examples):
        for found, true in example:
            counts[n, 0, number[true]] += found == true
            counts[n, 1, number[found]] += 1
            counts[n, 2, number[true]] += 1
    return counts.reshape(len(examples), -1)


def _get_count_score(rule: str, labels: Sequence[Any]) -> Callable[[Floats], float]:
    if rule == "f1_binary" and len(labels) > 2:
        raise ValueError(
            f"f1_binary is of two labels, and there are {len(labels)}: {', '.join(map(str, labels))}; "
            "choose f1_macro"
        )
    return _COUNT_SCORES[rule]


def _compute_label_f1(counts: Floats) -> Floats:
    """F1 of each label, (L,); 0 for one that is nowhere."""
    hits, found, true = counts
    return 2 * hits / np.maximum(found + true, 1)


def _compute_accuracy(counts: Floats) -> float:
    return float(counts[0].sum() / counts[2].sum())


def _compute_macro_f1(counts: Floats) -> float:
    seen = counts[1] + counts[2] > 0
    return float(_compute_label_f1(counts)[seen].mean())


def _compute_binary_f1(counts: Floats) -> float:
    return float(_compute_label_f1(counts)[-1])


def _compute_matthews(counts: Floats) -> float:
    hits, found, true = counts
    total = true.sum()
    together = hits.sum() * total - found @ true
    spread = np.sqrt(total**2 - found @ found) * np.sqrt(total**2 - true @ true)
    return float(together / spread) if spread > 0 else 0.0


_COUNT_SCORES: dict[str, Callable[[Floats], float]] = {
    "accuracy": _compute_accuracy,
    "f1_macro": _compute_macro_f1,
    "f1_binary": _compute_binary_f1,
    "matthews": _compute_matthews,
}

# ---- numbers ----


def _parse_numbers(texts: Sequence[str], what: str) -> Floats:
    try:
        return np.array([float(text) for text in texts])
    except ValueError as error:
        raise ValueError(f"a correlation is of numbers, and the {what} have others: {error}") from error


def _center_numbers(predictions: ArrayLike, references: ArrayLike) -> tuple[Floats, Floats]:
    """Both centred, so that their sums of squares lose no digits."""
    x, y = (np.ravel(side).astype(np.float64) for side in (predictions, references))
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(
            f"{len(x)} predictions and {len(y)} references: a correlation needs 2 of each at least"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a correlation is of finite numbers: there are NaN or infinite ones")
    return x - x.mean(), y - y.mean()


def _rank_numbers(values: Floats) -> Floats:
    from scipy.stats import rankdata  # takes a second to load

    ranks: Floats = rankdata(values)
    return ranks - ranks.mean()


def _compute_moments(x: Floats, y: Floats) -> Floats:
    """1, x, y, x^2, y^2 and xy of each example, (N, 6)."""
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _compute_spread(total: Floats) -> float:
    """n times the product of both standard deviations; 0 where one side is constant, rounding aside."""
    n, x, y, xx, yy, _ = total
    spreads = np.maximum([xx - x * x / n, yy - y * y / n], 0)
    constant = spreads <= 1e-12 * np.maximum([xx, yy], 1e-300)
    return 0.0 if constant.any() else float(np.sqrt(spreads[0]) * np.sqrt(spreads[1]))


def _compute_correlation(total: Floats) -> float:
    n, x, y, _, _, xy = total
    spread = _compute_spread(total)
    return float(np.clip((xy - x * y / n) / spread, -1, 1)) if spread > 0 else 0.0
