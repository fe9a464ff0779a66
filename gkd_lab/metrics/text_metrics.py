"""Scores of predictions against references, on the paper's 0 to 100 scale, each with a signature.

A signature names the rule, its settings and the library version: two scores compare if theirs are
equal. A setting that changes a score makes another metric (`rouge1_stem`), so that scores of both can be
asked for, computed from stored predictions and shown side by side. Documented ends: an empty prediction
scores 0 unless `exact_match` finds an empty reference.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING

from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.metrics.answers import (
    ANSWER_PATTERN,
    LAST_NUMBER_PATTERN,
    extract_answer,
    extract_last_number,
    normalize_answer,
)
from gkd_lab.metrics.classifier_metric_names import CLASSIFICATION_METRICS

if TYPE_CHECKING:
    from gkd_lab.metrics.rouge import RougeScorer

References = Sequence[Sequence[str]]  # one or more acceptable texts per example


@dataclass(frozen=True)
class Score:
    """One metric over all examples.

    `value` is the mean of `per_example` for all but bleu, chrf, F1, Matthews and `tag_accuracy`, which are
    corpus scores; their `per_example` holds sentence scores, for looking, not for averaging.
    """

    value: float  # 0 to 100, of a correlation -100 to 100
    per_example: list[float]
    signature: str
    rates: dict[str, float] = field(default_factory=dict)  # rates, 0 to 1


def _score_accuracy(predictions: Sequence[str], references: References) -> Score:
    answers = [extract_answer(text) for text in predictions]
    accepted = [{extract_answer(text) for text in texts} - {None} for texts in references]
    hits = [100.0 * (a in wanted) for a, wanted in zip(answers, accepted, strict=True)]
    rates = {
        "extraction_failure_rate": fmean(answer is None for answer in answers),
        "reference_without_answer_rate": fmean(not wanted for wanted in accepted),
    }
    return Score(fmean(hits), hits, f"accuracy|rule:gsm8k|answer:{ANSWER_PATTERN.pattern}", rates)


def _score_flexible_accuracy(predictions: Sequence[str], references: References) -> Score:
    answers = [extract_last_number(text) for text in predictions]
    hits = [
        100.0 * (answer is not None and normalize_answer(answer) in set(map(normalize_answer, texts)))
        for answer, texts in zip(answers, references, strict=True)
    ]
    rates = {"flexible_extraction_failure_rate": fmean(answer is None for answer in answers)}
    signature = (
        f"accuracy_flexible|rule:lm-eval-gsm8k-3-flexible-extract|answer:{LAST_NUMBER_PATTERN.pattern}"
    )
    return Score(fmean(hits), hits, signature, rates)


def _score_exact_match(predictions: Sequence[str], references: References) -> Score:
    hits = [
        100.0 * (prediction.strip() in {text.strip() for text in texts})
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return Score(fmean(hits), hits, "exact_match|strip:yes|case:mixed")


def _build_corpus_scorer(kind: str) -> Callable[[Sequence[str], References], Score]:
    def scored(predictions: Sequence[str], references: References) -> Score:
        from gkd_lab.metrics.corpus import score_corpus

        return Score(*score_corpus(kind, predictions, references))

    return scored


def _build_classification_scorer(metric: str) -> Callable[[Sequence[str], References], Score]:
    def scored(predictions: Sequence[str], references: References) -> Score:
        from gkd_lab.metrics.classifier_metrics import compute_statistics, score_texts

        counted, rule = compute_statistics(metric, predictions, references)
        each = score_texts(metric, predictions, references)
        return Score(rule(counted.sum(0).tolist()), each, f"{metric}|rule:gkd-lab-classification-1")

    return scored


def _score_self_bleu(predictions: Sequence[str], prompts: Sequence[int] | None) -> Score:
    from gkd_lab.metrics.diversity import compute_self_bleu, format_signature

    ids = range(len(predictions)) if prompts is None else prompts
    pairs = groupby(zip(ids, predictions, strict=True), key=lambda pair: pair[0])
    groups = [[text for _, text in group] for _, group in pairs]
    sizes = sorted(map(len, groups))
    if sizes[0] < 2 or sizes[0] != sizes[-1]:
        raise ValueError(
            "self_bleu compares several texts of one prompt, as many of each: there are from "
            f"{sizes[0]} to {sizes[-1]}; set `samples: 8`, say, in an evaluation that samples"
        )
    values = [value for group in groups for value in compute_self_bleu(group)]
    return Score(fmean(values), values, format_signature(sizes[0]))


_ROUGE_VARIANTS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_STEM_SUFFIX = "_stem"
_METRIC_FUNCTIONS: dict[str, Callable[[Sequence[str], References], Score]] = {
    "accuracy": _score_accuracy,
    "accuracy_flexible": _score_flexible_accuracy,
    "exact_match": _score_exact_match,
    "bleu": _build_corpus_scorer("bleu"),
    "chrf": _build_corpus_scorer("chrf"),
    **{metric: _build_classification_scorer(metric) for metric in CLASSIFICATION_METRICS},
}
METRICS: tuple[str, ...] = (
    "accuracy",
    "exact_match",
    "accuracy_flexible",
    *_ROUGE_VARIANTS,
    *(f"{kind}{_STEM_SUFFIX}" for kind in _ROUGE_VARIANTS),
    "bleu",
    "chrf",
    "self_bleu",
    *CLASSIFICATION_METRICS,
)


def _check_inputs(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: References,
    prompts: Sequence[int] | None,
) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise build_unknown_name_error("metric", metric, METRICS)
    if not predictions:
        raise ValueError("nothing to score: there are 0 predictions")
    if len(predictions) != len(references):
        raise ValueError(
            f"every prediction needs its references: {len(predictions)} predictions, "
            f"{len(references)} lists of references"
        )
    if prompts is not None and len(prompts) != len(predictions):
        raise ValueError(
            f"every prediction needs its prompt: {len(predictions)} predictions, {len(prompts)} prompts"
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(f"references[{index}] must be a list of texts, got {texts!r:.60}")
        if not texts:
            raise ValueError(f"references[{index}] is empty: an example needs at least one text")


class Scorer:
    """Scores the predictions of any number of cells; what they share is computed once.

    Its memory of texts and pairs is bounded and lives as long as the object.
    """

    def __init__(self) -> None:
        self._rouge_scorers: dict[tuple[tuple[str, ...], bool], RougeScorer] = {}

    def score_many(
        self,
        metrics: Sequence[str],
        predictions: Sequence[str],
        references: References,
        *,
        use_stemmer: bool = False,
        prompts: Sequence[int] | None = None,
    ) -> dict[str, Score]:
        """Every metric over the same predictions, in the order asked; ROUGE reads each pair once.

        With several references the accuracies and exact match accept any, ROUGE takes the best, BLEU and
        chrF count against all. `rouge1_stem` and its like stem words; `use_stemmer` makes `rouge1` do so
        too (no is rouge_score's default; the paper does not say). `prompts` numbers the prompt of each
        prediction, those of one prompt in a row; only `self_bleu` asks. Raises ValueError for an unknown
        metric, zero examples or an example without references.
        """
        _check_inputs(metrics, predictions, references, prompts)
        rouge = self._score_rouge(metrics, predictions, references, use_stemmer)
        empty = fmean(not prediction.strip() for prediction in predictions)
        scores = {}
        for metric in metrics:
            if metric in rouge:
                one = rouge[metric]
            elif metric == "self_bleu":
                one = _score_self_bleu(predictions, prompts)
            else:
                one = _METRIC_FUNCTIONS[metric](predictions, references)
            one.rates["empty_prediction_rate"] = empty
            scores[metric] = one
        return scores

    def _score_rouge(
        self,
        metrics: Iterable[str],
        predictions: Sequence[str],
        references: References,
        use_stemmer: bool,
    ) -> dict[str, Score]:
        """Those of the metrics that are ROUGE's."""
        asked: dict[bool, dict[str, str]] = {}
        for metric in metrics:
            kind = metric.removesuffix(_STEM_SUFFIX)
            if kind in _ROUGE_VARIANTS:
                asked.setdefault(use_stemmer or kind != metric, {})[metric] = kind
        found: dict[str, Score] = {}
        for stem, kinds in asked.items():
            scorer = self._get_rouge_scorer(tuple(dict.fromkeys(kinds.values())), stem)
            values = scorer(predictions, references)
            for metric, kind in kinds.items():
                one = values[kind]
                found[metric] = Score(fmean(one), one, scorer.format_signature(kind))
        return found

    def _get_rouge_scorer(self, kinds: tuple[str, ...], use_stemmer: bool) -> "RougeScorer":
        from gkd_lab.metrics.rouge import RougeScorer

        if (kinds, use_stemmer) not in self._rouge_scorers:
            self._rouge_scorers[kinds, use_stemmer] = RougeScorer(kinds, use_stemmer=use_stemmer)
        return self._rouge_scorers[kinds, use_stemmer]


def score_many(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: References,
    *,
    use_stemmer: bool = False,
    prompts: Sequence[int] | None = None,
) -> dict[str, Score]:
    """Every metric over the same predictions; see `Scorer.score_many`."""
    return Scorer().score_many(metrics, predictions, references, use_stemmer=use_stemmer, prompts=prompts)


def score(
    metric: str,
    predictions: Sequence[str],
    references: References,
    *,
    use_stemmer: bool = False,
    prompts: Sequence[int] | None = None,
) -> Score:
    """One metric over all examples; see `Scorer.score_many`."""
    found = score_many([metric], predictions, references, use_stemmer=use_stemmer, prompts=prompts)
    return found[metric]
