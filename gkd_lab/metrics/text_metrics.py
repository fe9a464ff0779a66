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

from gkd_lab.config.errors import unknown
from gkd_lab.metrics.answers import ANSWER, LAST_NUMBER, extract_answer, last_number, without_ignored
from gkd_lab.metrics.classifier_metric_names import CLASSIFICATION_METRICS

if TYPE_CHECKING:
    from gkd_lab.metrics.rouge import Rouge

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
    extra: dict[str, float] = field(default_factory=dict)  # rates, 0 to 1


def _accuracy(predictions: Sequence[str], references: References) -> Score:
    answers = [extract_answer(text) for text in predictions]
    accepted = [{extract_answer(text) for text in texts} - {None} for texts in references]
    hits = [100.0 * (a in wanted) for a, wanted in zip(answers, accepted, strict=True)]
    rates = {
        "extraction_failure_rate": fmean(answer is None for answer in answers),
        "reference_without_answer_rate": fmean(not wanted for wanted in accepted),
    }
    return Score(fmean(hits), hits, f"accuracy|rule:gsm8k|answer:{ANSWER.pattern}", rates)


def _accuracy_flexible(predictions: Sequence[str], references: References) -> Score:
    answers = [last_number(text) for text in predictions]
    hits = [
        100.0 * (answer is not None and without_ignored(answer) in set(map(without_ignored, texts)))
        for answer, texts in zip(answers, references, strict=True)
    ]
    rates = {"flexible_extraction_failure_rate": fmean(answer is None for answer in answers)}
    signature = f"accuracy_flexible|rule:lm-eval-gsm8k-3-flexible-extract|answer:{LAST_NUMBER.pattern}"
    return Score(fmean(hits), hits, signature, rates)


def _exact_match(predictions: Sequence[str], references: References) -> Score:
    hits = [
        100.0 * (prediction.strip() in {text.strip() for text in texts})
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return Score(fmean(hits), hits, "exact_match|strip:yes|case:mixed")


def _corpus(kind: str) -> Callable[[Sequence[str], References], Score]:
    def scored(predictions: Sequence[str], references: References) -> Score:
        from gkd_lab.metrics.corpus import score_corpus

        return Score(*score_corpus(kind, predictions, references))

    return scored


def _classification(metric: str) -> Callable[[Sequence[str], References], Score]:
    def scored(predictions: Sequence[str], references: References) -> Score:
        from gkd_lab.metrics.classifier_metrics import per_text, statistics

        counted, rule = statistics(metric, predictions, references)
        each = per_text(metric, predictions, references)
        return Score(rule(counted.sum(0).tolist()), each, f"{metric}|rule:gkd-lab-classification-1")

    return scored


def _self_bleu(predictions: Sequence[str], prompts: Sequence[int] | None) -> Score:
    from gkd_lab.metrics.diversity import self_bleu, signature

    ids = range(len(predictions)) if prompts is None else prompts
    pairs = groupby(zip(ids, predictions, strict=True), key=lambda pair: pair[0])
    groups = [[text for _, text in group] for _, group in pairs]
    sizes = sorted(map(len, groups))
    if sizes[0] < 2 or sizes[0] != sizes[-1]:
        raise ValueError(
            "self_bleu compares several texts of one prompt, as many of each: there are from "
            f"{sizes[0]} to {sizes[-1]}; set `samples: 8`, say, in an evaluation that samples"
        )
    values = [value for group in groups for value in self_bleu(group)]
    return Score(fmean(values), values, signature(sizes[0]))


_ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_STEMMED = "_stem"
_SINGLE: dict[str, Callable[[Sequence[str], References], Score]] = {
    "accuracy": _accuracy,
    "accuracy_flexible": _accuracy_flexible,
    "exact_match": _exact_match,
    "bleu": _corpus("bleu"),
    "chrf": _corpus("chrf"),
    **{metric: _classification(metric) for metric in CLASSIFICATION_METRICS},
}
METRICS: tuple[str, ...] = (
    "accuracy",
    "exact_match",
    "accuracy_flexible",
    *_ROUGE_KINDS,
    *(f"{kind}{_STEMMED}" for kind in _ROUGE_KINDS),
    "bleu",
    "chrf",
    "self_bleu",
    *CLASSIFICATION_METRICS,
)


def _check(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: References,
    prompts: Sequence[int] | None,
) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
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
        self._rouge: dict[tuple[tuple[str, ...], bool], Rouge] = {}

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
        _check(metrics, predictions, references, prompts)
        rouge = self._score_rouge(metrics, predictions, references, use_stemmer)
        empty = fmean(not prediction.strip() for prediction in predictions)
        scores = {}
        for metric in metrics:
            if metric in rouge:
                one = rouge[metric]
            elif metric == "self_bleu":
                one = _self_bleu(predictions, prompts)
            else:
                one = _SINGLE[metric](predictions, references)
            one.extra["empty_prediction_rate"] = empty
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
            kind = metric.removesuffix(_STEMMED)
            if kind in _ROUGE_KINDS:
                asked.setdefault(use_stemmer or kind != metric, {})[metric] = kind
        found: dict[str, Score] = {}
        for stem, kinds in asked.items():
            scorer = self._rouge_scorer(tuple(dict.fromkeys(kinds.values())), stem)
            values = scorer(predictions, references)
            for metric, kind in kinds.items():
                one = values[kind]
                found[metric] = Score(fmean(one), one, scorer.signature(kind))
        return found

    def _rouge_scorer(self, kinds: tuple[str, ...], use_stemmer: bool) -> "Rouge":
        from gkd_lab.metrics.rouge import Rouge

        if (kinds, use_stemmer) not in self._rouge:
            self._rouge[kinds, use_stemmer] = Rouge(kinds, use_stemmer=use_stemmer)
        return self._rouge[kinds, use_stemmer]


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
