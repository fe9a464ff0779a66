"""Self-BLEU: similarity of the texts that a model samples for one prompt.

Zhu et al. 2018 (Texygen): each text is a hypothesis and all others are its references; the mean of their
BLEU, by NLTK's `sentence_bleu` with uniform weights and smoothing method 1. The GKD paper (Fig. 4) states
neither the order of the n-grams nor the number of texts: the order here is 4, BLEU's own.
"""

from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby
from statistics import fmean

from gkd_lab.metrics.score import MetricInput, Score
from gkd_lab.metrics.scripts import warn_of_missing_spaces

MAX_NGRAM_ORDER = 4


def score_self_bleu(inputs: MetricInput) -> Score:
    """Return a Score, 0 to 100: the mean BLEU of each text against the others of its prompt.

    Raises ValueError for a prompt with fewer than 2 texts, or unequal numbers of texts.
    """
    prompts = range(len(inputs.predictions)) if inputs.prompts is None else inputs.prompts
    pairs = groupby(zip(prompts, inputs.predictions, strict=True), key=lambda pair: pair[0])
    groups = [[text for _, text in group] for _, group in pairs]
    sizes = sorted(map(len, groups))
    if sizes[0] < 2 or sizes[0] != sizes[-1]:
        raise ValueError(
            "self_bleu compares several texts of one prompt, as many of each: there are from "
            f"{sizes[0]} to {sizes[-1]}; set `samples: 8`, say, in an evaluation that samples"
        )
    warn_of_missing_spaces("self_bleu", inputs.predictions)
    values = [value for group in groups for value in compute_self_bleu(group)]
    settings = f"order:{MAX_NGRAM_ORDER}|samples:{sizes[0]}|smooth:method1|tok:nltk"
    return Score(fmean(values), values, f"self_bleu|{settings}|version:{version('nltk')}")


def compute_self_bleu(texts: Sequence[str]) -> list[float]:
    """Return BLEU of each text of one prompt against the other texts, 0 (different) to 100 (equal).

    A text of fewer than 4 words lacks n-grams of the highest orders and stays below 100, as in NLTK.
    Words are those of NLTK's tokenizer, without its splitting into sentences, which needs a download.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    words = [NLTKWordTokenizer().tokenize(text) for text in texts]
    weights, smoothing = (1 / MAX_NGRAM_ORDER,) * MAX_NGRAM_ORDER, SmoothingFunction().method1
    bleu_by_text: dict[str, float] = {}
    for n, text in enumerate(texts):
        if text not in bleu_by_text:
            references = words[:n] + words[n + 1 :]
            bleu_by_text[text] = 100.0 * sentence_bleu(references, words[n], weights, smoothing)
    return [bleu_by_text[text] for text in texts]
