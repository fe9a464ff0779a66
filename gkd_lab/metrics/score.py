"""Scores of predictions against references, on the paper's 0 to 100 scale, each with a signature.

A signature names the rule, its settings and the library version: two scores compare if theirs are
equal. Documented ends: an empty prediction scores 0 unless `exact_match` finds an empty reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from gkd_lab.metrics.answers import ANSWER, extract_answer
from gkd_lab.spec.errors import unknown

References = Sequence[Sequence[str]]  # one or more acceptable texts per example


@dataclass(frozen=True)
class Score:
    """One metric over all examples.

    `value` is the mean of `per_example` for all but bleu and chrf, which are corpus scores; their
    `per_example` holds sentence scores, for looking and for resampling, not for averaging.
    """

    value: float  # 0 to 100
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


def _exact_match(predictions: Sequence[str], references: References) -> Score:
    hits = [
        100.0 * (prediction.strip() in {text.strip() for text in texts})
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return Score(fmean(hits), hits, "exact_match|strip:yes|case:mixed")


def _rouge(
    kinds: Sequence[str], predictions: Sequence[str], references: References, use_stemmer: bool
) -> dict[str, Score]:
    from gkd_lab.metrics.rouge import score_rouge

    return {
        kind: Score(fmean(values), values, signature)
        for kind, (values, signature) in score_rouge(
            kinds, predictions, references, use_stemmer=use_stemmer
        ).items()
    }


def _corpus(kind: str) -> Callable[[Sequence[str], References], Score]:
    def scored(predictions: Sequence[str], references: References) -> Score:
        from gkd_lab.metrics.corpus import score_corpus

        return Score(*score_corpus(kind, predictions, references))

    return scored


_ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
_SINGLE: dict[str, Callable[[Sequence[str], References], Score]] = {
    "accuracy": _accuracy,
    "exact_match": _exact_match,
    "bleu": _corpus("bleu"),
    "chrf": _corpus("chrf"),
}
METRICS: tuple[str, ...] = ("accuracy", "exact_match", *_ROUGE_KINDS, "bleu", "chrf")


def _check(metrics: Sequence[str], predictions: Sequence[str], references: References) -> None:
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
    for index, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(f"references[{index}] must be a list of texts, got {texts!r:.60}")
        if not texts:
            raise ValueError(f"references[{index}] is empty: an example needs at least one text")


def score_many(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: References,
    *,
    use_stemmer: bool = False,
) -> dict[str, Score]:
    """Every metric over the same predictions, in the order asked; ROUGE reads each pair once.

    With several references accuracy and exact match accept any, ROUGE takes the best, BLEU and
    chrF count against all. `use_stemmer` is ROUGE's (rouge_score's own default; the paper does not
    say). Raises ValueError for an unknown metric, zero examples or an example without references.
    """
    _check(metrics, predictions, references)
    rouge_kinds = [kind for kind in _ROUGE_KINDS if kind in metrics]
    rouge = _rouge(rouge_kinds, predictions, references, use_stemmer) if rouge_kinds else {}
    empty = fmean(not prediction.strip() for prediction in predictions)
    scores = {}
    for metric in metrics:
        one = rouge[metric] if metric in rouge else _SINGLE[metric](predictions, references)
        one.extra["empty_prediction_rate"] = empty
        scores[metric] = one
    return scores


def score(
    metric: str, predictions: Sequence[str], references: References, *, use_stemmer: bool = False
) -> Score:
    """One metric over all examples; see `score_many`."""
    return score_many([metric], predictions, references, use_stemmer=use_stemmer)[metric]
