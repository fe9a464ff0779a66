"""Statistics of examples against sacreBLEU and hand values."""

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from gkd_lab.metrics import score
from gkd_lab.tables.example_statistics import ExampleStatistics, build_example_statistics

TEXTS = ["the cat sat on the mat", "a dog ran home quickly today", "we eat bread at noon", "", "it rains"]
REFERENCES = [
    ["the cat sat on a mat"],
    ["the dog ran home quickly"],
    ["they ate bread"],
    ["so"],
    ["it rains"],
]


def build_rows(samples: int = 1) -> list[dict[str, object]]:
    return [
        {"prediction": text, "references": references, "sample": n % samples}
        for n, (text, references) in enumerate(zip(TEXTS, REFERENCES, strict=True))
    ]


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_a_corpus_sample_scores_chosen_examples_as_sacrebleu_scores_their_texts(metric: str) -> None:
    sample = build_example_statistics(metric, build_rows(), [0.0] * 5)
    assert sample.score == pytest.approx(score(metric, TEXTS, REFERENCES).value)
    drawn = [0, 0, 2, 4, 1]
    scorer = BLEU() if metric == "bleu" else CHRF()
    theirs = scorer.corpus_score([TEXTS[n] for n in drawn], [[REFERENCES[n][0] for n in drawn]]).score
    assert sample.select_examples(drawn).score == pytest.approx(theirs)


def test_several_texts_of_one_prompt_are_one_example() -> None:
    four = build_rows(2)[:4]
    mean = build_example_statistics("rouge1", four, [1.0, 3.0, 10.0, 20.0])
    assert mean.statistics.tolist() == [[2.0], [15.0]]
    corpus = build_example_statistics("bleu", four, [0.0] * 4)
    assert len(corpus) == 2
    assert corpus.score == pytest.approx(score("bleu", TEXTS[:4], REFERENCES[:4]).value)


def test_a_value_is_the_mean_of_the_examples() -> None:
    assert ExampleStatistics(np.array([[1.0], [2.0], [6.0]])).score == 3.0
