"""Self-BLEU: how much the texts that a model writes for one prompt repeat each other.

Zhu et al. 2018 (Texygen): each text is a hypothesis and all others are its references; the mean of their
BLEU, by NLTK's `sentence_bleu` with uniform weights and smoothing method 1. The GKD paper (Fig. 4) states
neither the order of the n-grams nor the number of texts: the order here is 4, BLEU's own.
"""

from collections.abc import Sequence
from importlib.metadata import version

MAX_NGRAM_ORDER = 4


def compute_self_bleu(texts: Sequence[str]) -> list[float]:
    """BLEU of each text against all others of the same prompt, 0 (all different) to 100 (all equal).

    A text of fewer than 4 words lacks n-grams of the highest orders and stays below 100, as in NLTK.
    Words are those of NLTK's tokenizer, without its splitting into sentences, which needs a download.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    words = [NLTKWordTokenizer().tokenize(text) for text in texts]
    weights, smoothing = (1 / MAX_NGRAM_ORDER,) * MAX_NGRAM_ORDER, SmoothingFunction().method1
    known: dict[str, float] = {}
    for n, text in enumerate(texts):
        if text not in known:
            others = words[:n] + words[n + 1 :]
            known[text] = 100.0 * sentence_bleu(others, words[n], weights, smoothing)
    return [known[text] for text in texts]


def format_signature(samples: int) -> str:
    """Rule, settings and version; `samples` texts a prompt."""
    return f"self_bleu|order:{MAX_NGRAM_ORDER}|samples:{samples}|smooth:method1|tok:nltk|version:{version('nltk')}"
