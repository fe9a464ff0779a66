"""On real text each metric gives its reference implementation's number."""

from statistics import fmean

import pytest
import sacrebleu
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer

from gkd_lab.metrics import score, score_many

from .real_text import list_docstrings

PREDICTIONS = [body for body, _ in list_docstrings()]
REFERENCES = [[first_line, body[: len(body) // 2]] for body, first_line in list_docstrings()]
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def test_the_text_is_real_and_not_trivial() -> None:
    assert len(PREDICTIONS) > 100
    assert 5 < score("rouge1", PREDICTIONS, [texts[:1] for texts in REFERENCES]).value < 60
    assert any("\n" in text for text in PREDICTIONS)


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_is_rouge_scores(stem: bool) -> None:
    names = [f"{kind}_stem" if stem else kind for kind in KINDS]
    scores = score_many(names, PREDICTIONS, REFERENCES)
    scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=stem)
    expected = [scorer.score_multi(t, p) for p, t in zip(PREDICTIONS, REFERENCES, strict=True)]
    for name, kind in zip(names, KINDS, strict=True):
        assert scores[name].per_example == [100 * reference[kind].fmeasure for reference in expected]
        assert scores[name].value == fmean(100 * reference[kind].fmeasure for reference in expected)


def test_bleu_and_chrf_are_sacrebleus() -> None:
    streams = [list(stream) for stream in zip(*REFERENCES, strict=True)]
    bleu, chrf = score("bleu", PREDICTIONS, REFERENCES), score("chrf", PREDICTIONS, REFERENCES)
    assert bleu.value == sacrebleu.corpus_bleu(PREDICTIONS, streams).score
    assert chrf.value == sacrebleu.corpus_chrf(PREDICTIONS, streams).score
    assert 10 < bleu.value < 90 and 10 < chrf.value < 90


def test_self_bleu_is_the_mean_of_nltks_bleu_of_each_text_against_the_others() -> None:
    texts = PREDICTIONS[:120]
    prompts = [n // 4 for n in range(120)]
    scored = score("self_bleu", texts, [[""]] * 120, prompts=prompts)
    words = [NLTKWordTokenizer().tokenize(text) for text in texts]
    smooth = SmoothingFunction().method1
    expected = []
    for n in range(120):
        others = [words[k] for k in range(n - n % 4, n - n % 4 + 4) if k != n]
        expected.append(100 * sentence_bleu(others, words[n], (0.25,) * 4, smoothing_function=smooth))
    assert scored.per_example == expected
    assert scored.value == fmean(expected)
    assert 1 < scored.value < 90


NUMBERS = [
    text + end
    for text, end in zip(
        PREDICTIONS,
        ["", " #### 5", " It is $1,000.", " 7.50 in all", " -3", " so 12 ...", "\n#### 8\n9"] * 30,
        strict=False,
    )
]


@pytest.mark.parametrize("target", ["steps #### 5", "#### 1,000", "7.5 #### 7.50", "#### -3", "#### 9"])
def test_flexible_accuracy_is_lm_evals(target: str) -> None:
    extract = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    extracted = [answer for (answer,) in extract.apply([[text] for text in NUMBERS], [])]
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    expected = [
        exact_match_hf_evaluate([answer], [target], regexes_to_ignore=ignored, ignore_case=True)[
            "exact_match"
        ]
        for answer in extracted
    ]
    scored = score("accuracy_flexible", NUMBERS, [[target]] * len(NUMBERS))
    assert scored.per_example == [100 * hit for hit in expected]
    assert 0 < scored.value < 100
    failures = scored.rates["flexible_extraction_failure_rate"]
    assert failures == fmean(answer == "[invalid]" for answer in extracted)
