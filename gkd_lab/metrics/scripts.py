"""Scripts that are written without spaces between words, for metrics that split words at spaces."""

import re
import warnings
from collections.abc import Iterable

SCRIPTS_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Thai, Lao, Burmese, Khmer, Hiragana, Katakana and Han, as ranges within a regular expression's `[]`."""
_WITHOUT_SPACES = re.compile(f"[{SCRIPTS_WITHOUT_SPACES}\U00020000-\U0003ffff]")  # and rare Han
_LONG_WORD = 5
"""Letters of a word, on average, above which such texts have not been split into words."""


def warn_of_missing_spaces(metric: str, texts: Iterable[str]) -> None:
    """Warn if most letters of the texts are of such scripts, not split into words: a sentence is one then."""
    n_letters = n_unspaced = n_words = 0
    for text in texts:
        n_letters += sum(map(str.isalnum, text))
        n_unspaced += sum(map(str.isalnum, _WITHOUT_SPACES.findall(text)))
        n_words += len(text.split())
    if 2 * n_unspaced > n_letters > _LONG_WORD * n_words:
        warnings.warn(
            f"{metric} splits words at spaces, and most of these texts are of a script without: its score "
            "says little; use chrf or rouge1_unicode, or put spaces between the words",
            stacklevel=3,
        )
