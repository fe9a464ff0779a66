"""ROUGE F-measures of rouge_score, the implementation the T5 papers used."""

from collections.abc import Sequence
from importlib.metadata import version

from rouge_score import rouge_scorer


def score_rouge(
    kinds: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    use_stemmer: bool,
) -> dict[str, tuple[list[float], str]]:
    """Per kind: the values of each example (0 to 100, best reference) and the signature.

    rougeL is over the whole text; splitting into sentences would be rougeLsum.
    """
    scorer = rouge_scorer.RougeScorer(list(kinds), use_stemmer=use_stemmer)
    values: dict[str, list[float]] = {kind: [] for kind in kinds}
    for prediction, texts in zip(predictions, references, strict=True):
        measured = [scorer.score(text, prediction) for text in texts]
        for kind in kinds:
            values[kind].append(100.0 * max(one[kind].fmeasure for one in measured))
    settings = f"stem:{'yes' if use_stemmer else 'no'}|refs:best|version:{version('rouge-score')}"
    return {kind: (values[kind], f"{kind}|measure:f|{settings}") for kind in kinds}
