"""sacreBLEU's corpus scores with their signatures, and sentence scores for each example."""

from collections.abc import Sequence
from itertools import zip_longest

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF


def _streams(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """One list per reference position, as sacreBLEU wants them; None where an example has fewer."""
    return list(map(list, zip_longest(*references)))  # sacreBLEU's types leave its None out


def score_corpus(
    kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float], str]:
    """Corpus value, sentence values, signature (of the corpus value).

    Sentence BLEU uses the effective order, which sacreBLEU asks for on short texts.
    """
    corpus, sentence = (CHRF(), CHRF()) if kind == "chrf" else (BLEU(), BLEU(effective_order=True))
    value = corpus.corpus_score(list(predictions), _streams(references)).score
    per_example = [
        sentence.sentence_score(prediction, list(texts)).score
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return value, per_example, f"{kind}|{corpus.get_signature()}"
