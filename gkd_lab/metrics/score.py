"""Inputs and outputs that all metrics of texts share. Loads neither numpy nor a metric library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

References = Sequence[Sequence[str]]  # one or more acceptable texts per example

LABEL_METRICS = ("label_accuracy", "f1_macro", "f1_binary", "matthews")
"""Classification: the whole text is the label."""
TAG_METRICS = ("tag_accuracy", "tag_f1_macro")
"""Tagging: the text is one tag per token, separated by spaces."""
CORRELATION_METRICS = ("pearson", "spearman")
"""Regression: the text is a number."""
CLASSIFICATION_METRICS = (*LABEL_METRICS, *TAG_METRICS, *CORRELATION_METRICS)


@dataclass(frozen=True)
class MetricInput:
    """Predictions and their references, one entry per example: the argument of every metric."""

    predictions: Sequence[str]
    references: References
    prompts: Sequence[int] | None = None
    """Number of each prediction's prompt, samples of one prompt in a row; only `self_bleu` reads it."""


@dataclass(frozen=True)
class Score:
    """One metric over all examples.

    `value` is the mean of `per_example`, except for a corpus score, whose `per_example` holds sentence scores
    to look at, not to average.
    """

    value: float  # 0 to 100; a correlation -100 to 100
    per_example: list[float]
    signature: str
    rates: dict[str, float] = field(default_factory=dict)  # 0 to 1


@dataclass(frozen=True)
class CorpusStatistics:
    """Sufficient statistics of a corpus score: their sum over examples determines the score."""

    per_example: "NDArray[np.float64]"
    """(N, K): K statistics of N examples."""
    compute_score: Callable[[Sequence[float]], float]
    """Summed statistics (K,) -> score, 0 to 100; a correlation -100 to 100."""
