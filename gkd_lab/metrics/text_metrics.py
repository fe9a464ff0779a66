"""Registry of metrics and their scorer: predictions against references, 0 to 100, each with a signature.

A new metric is one entry of `METRICS`. A signature names the rule, its settings and the library version: two
scores are comparable if their signatures are equal. A setting that changes a score makes a metric of its own
(`rouge1_stem`), so that both can be computed from stored predictions and shown side by side. An empty
prediction scores 0 unless `exact_match` has an empty reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.metrics.answers import (
    score_accuracy,
    score_exact_match,
    score_flexible_accuracy,
    score_numeric_accuracy,
)
from gkd_lab.metrics.score import (
    CLASSIFICATION_METRICS,
    CorpusStatistics,
    MetricInput,
    References,
    Score,
)
from gkd_lab.metrics.self_bleu import score_self_bleu

if TYPE_CHECKING:
    from gkd_lab.metrics.rouge import RougeScorer, WordKind


@dataclass(frozen=True)
class RougeVariant:
    """A ROUGE score. All that are requested are computed together: each pair of texts is read once."""

    name: str  # of rouge_score, such as rougeL
    use_stemmer: bool = False
    words: "WordKind" = "ascii"


@dataclass(frozen=True)
class Metric:
    """One metric: its score and how the score is resampled."""

    compute_score: Callable[[MetricInput], Score] | RougeVariant
    compute_statistics: Callable[[MetricInput], CorpusStatistics] | None = None
    """Statistics of a corpus score; None: the score is the mean of the per-example scores."""
    compute_interval: Callable[[MetricInput], tuple[float, float]] | None = None
    """A library's own 95 % interval over examples of a corpus score; None: our bootstrap."""


def _define_sacrebleu_metric(name: str) -> Metric:
    """Return the Metric `bleu` or `chrf`; sacreBLEU is loaded when the metric is computed."""

    def compute_score(inputs: MetricInput) -> Score:
        """Return the corpus score as a Score."""
        from gkd_lab.metrics.sacrebleu_metrics import score_corpus

        return score_corpus(name, inputs)

    def compute_statistics(inputs: MetricInput) -> CorpusStatistics:
        """Return the n-gram counts of each example."""
        from gkd_lab.metrics.sacrebleu_metrics import compute_corpus_statistics

        return compute_corpus_statistics(name, inputs)

    def compute_interval(inputs: MetricInput) -> tuple[float, float]:
        """Return sacreBLEU's own 95 % interval (low, high)."""
        from gkd_lab.metrics.sacrebleu_metrics import bootstrap_sacrebleu_interval

        return bootstrap_sacrebleu_interval(name, inputs)

    return Metric(compute_score, compute_statistics, compute_interval)


def _define_classification_metric(name: str) -> Metric:
    """Return a Metric of labels, tags or numbers; numpy and scikit-learn are loaded when it is computed."""

    def compute_score(inputs: MetricInput) -> Score:
        """Return the Score by scikit-learn or scipy."""
        from gkd_lab.metrics.classifier_metrics import score_texts

        return score_texts(name, inputs)

    def compute_statistics(inputs: MetricInput) -> CorpusStatistics:
        """Return label counts, or moments of numbers, of each example."""
        from gkd_lab.metrics.classifier_metrics import compute_classification_statistics

        return compute_classification_statistics(name, inputs)

    return Metric(compute_score, compute_statistics)


_ROUGE_VARIANTS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
METRICS: dict[str, Metric] = {
    "accuracy": Metric(score_accuracy),
    "exact_match": Metric(score_exact_match),
    "accuracy_flexible": Metric(score_flexible_accuracy),
    "accuracy_numeric": Metric(score_numeric_accuracy),
    **{name: Metric(RougeVariant(name)) for name in _ROUGE_VARIANTS},
    **{f"{name}_stem": Metric(RougeVariant(name, use_stemmer=True)) for name in _ROUGE_VARIANTS},
    **{f"{name}_unicode": Metric(RougeVariant(name, words="unicode")) for name in _ROUGE_VARIANTS},
    "bleu": _define_sacrebleu_metric("bleu"),
    "chrf": _define_sacrebleu_metric("chrf"),
    "self_bleu": Metric(score_self_bleu),
    **{name: _define_classification_metric(name) for name in CLASSIFICATION_METRICS},
}
CORPUS_METRICS = tuple(name for name, metric in METRICS.items() if metric.compute_statistics)
"""Scores of a whole corpus; the mean of their sentence scores is another number."""


def _check_inputs(metrics: Sequence[str], inputs: MetricInput) -> None:
    """Raise ValueError for an unknown metric, no predictions, or lists of unequal length."""
    for metric in metrics:
        if metric not in METRICS:
            raise build_unknown_name_error("metric", metric, METRICS)
    count = len(inputs.predictions)
    if not count:
        raise ValueError("nothing to score: there are 0 predictions")
    if count != len(inputs.references):
        raise ValueError(
            f"every prediction needs its references: {count} predictions, "
            f"{len(inputs.references)} lists of references"
        )
    if inputs.prompts is not None and len(inputs.prompts) != count:
        raise ValueError(
            f"every prediction needs its prompt: {count} predictions, {len(inputs.prompts)} prompts"
        )
    for index, texts in enumerate(inputs.references):
        if isinstance(texts, str):
            raise ValueError(f"references[{index}] must be a list of texts, got {texts!r:.60}")
        if not texts:
            raise ValueError(f"references[{index}] is empty: an example needs at least one text")


class Scorer:
    """Scores the predictions of any number of cells; shared texts are processed once.

    Its caches of texts and pairs are bounded and live as long as the object.
    """

    def __init__(self) -> None:
        self._rouge_scorers: dict[tuple[tuple[str, ...], bool, WordKind], RougeScorer] = {}

    def score_many(
        self,
        metrics: Sequence[str],
        predictions: Sequence[str],
        references: References,
        *,
        use_stemmer: bool = False,
        prompts: Sequence[int] | None = None,
    ) -> dict[str, Score]:
        """Return metric -> Score over the same predictions, in the order of `metrics`.

        With several references the accuracies and exact match accept any, ROUGE takes the best, BLEU and
        chrF count n-grams of all. `rouge1_stem` and the like stem words; `use_stemmer` makes `rouge1` do so
        too (rouge_score's default is no; the paper does not say); `rouge1_unicode` reads words of any script,
        where the others read a-z and 0-9 alone and warn of other texts. `prompts` numbers the prompt of each
        prediction, those of one prompt in a row, for `self_bleu`. Raises ValueError for an unknown metric,
        no examples or an example without references.
        """
        inputs = MetricInput(predictions, references, prompts)
        _check_inputs(metrics, inputs)
        scores = self._score_rouge(metrics, inputs, use_stemmer)
        empty_rate = fmean(not prediction.strip() for prediction in predictions)
        for metric in metrics:
            compute_score = METRICS[metric].compute_score
            if not isinstance(compute_score, RougeVariant):
                scores[metric] = compute_score(inputs)
            scores[metric].rates["empty_prediction_rate"] = empty_rate
        return {metric: scores[metric] for metric in metrics}

    def _score_rouge(
        self, metrics: Sequence[str], inputs: MetricInput, use_stemmer: bool
    ) -> dict[str, Score]:
        """Return metric -> Score of the ROUGE variants among the metrics; other metrics are left out."""
        names_by_words: dict[tuple[bool, WordKind], dict[str, str]] = {}
        for metric in metrics:
            variant = METRICS[metric].compute_score
            if isinstance(variant, RougeVariant):
                is_stemmed = variant.words == "ascii" and (use_stemmer or variant.use_stemmer)
                names_by_words.setdefault((is_stemmed, variant.words), {})[metric] = variant.name
        scores: dict[str, Score] = {}
        for (is_stemmed, words), names in names_by_words.items():
            scorer = self._get_rouge_scorer(tuple(dict.fromkeys(names.values())), is_stemmed, words)
            values = scorer(inputs.predictions, inputs.references)
            for metric, name in names.items():
                scores[metric] = Score(fmean(values[name]), values[name], scorer.format_signature(name))
        return scores

    def _get_rouge_scorer(
        self, variants: tuple[str, ...], use_stemmer: bool, words: "WordKind"
    ) -> "RougeScorer":
        """Return the RougeScorer of these variants and words; created once, then reused."""
        from gkd_lab.metrics.rouge import RougeScorer

        key = variants, use_stemmer, words
        if key not in self._rouge_scorers:
            self._rouge_scorers[key] = RougeScorer(variants, use_stemmer=use_stemmer, words=words)
        return self._rouge_scorers[key]


def score_many(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: References,
    *,
    use_stemmer: bool = False,
    prompts: Sequence[int] | None = None,
) -> dict[str, Score]:
    """Return metric -> Score over the same predictions; see `Scorer.score_many`."""
    return Scorer().score_many(metrics, predictions, references, use_stemmer=use_stemmer, prompts=prompts)


def score(
    metric: str,
    predictions: Sequence[str],
    references: References,
    *,
    use_stemmer: bool = False,
    prompts: Sequence[int] | None = None,
) -> Score:
    """Return the Score of one metric over all predictions; see `Scorer.score_many`."""
    scores = score_many([metric], predictions, references, use_stemmer=use_stemmer, prompts=prompts)
    return scores[metric]
