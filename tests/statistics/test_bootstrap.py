"""The bootstrap over examples, against sacreBLEU, hand values and the binomial."""

from statistics import fmean

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from gkd_lab.metrics import score
from gkd_lab.statistics.bootstrap import bootstrap_scores, compute_percentile_interval
from gkd_lab.tables.example_statistics import ExampleStatistics, build_example_statistics

from ..tables.prediction_records import build_mean_statistics

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
def test_a_corpus_sample_scores_every_resample_as_sacrebleu_scores_its_texts(metric: str) -> None:
    sample = build_example_statistics(metric, build_rows(), [0.0] * 5)
    assert sample.score == pytest.approx(score(metric, TEXTS, REFERENCES).value)
    drawn = [0, 0, 2, 4, 1]
    counts = np.bincount(drawn, minlength=5)[None].astype(float)
    scorer = BLEU() if metric == "bleu" else CHRF()
    theirs = scorer.corpus_score([TEXTS[n] for n in drawn], [[REFERENCES[n][0] for n in drawn]]).score
    assert sample.score_resamples(counts)[0] == pytest.approx(theirs)
    assert sample.select_examples([0, 2]).score == pytest.approx(
        score(metric, [TEXTS[0], TEXTS[2]], [REFERENCES[0], REFERENCES[2]]).value
    )


def test_several_texts_of_one_prompt_are_one_example() -> None:
    four = build_rows(2)[:4]
    mean = build_example_statistics("rouge1", four, [1.0, 3.0, 10.0, 20.0])
    assert mean.statistics.tolist() == [[2.0], [15.0]]
    corpus = build_example_statistics("bleu", four, [0.0] * 4)
    assert len(corpus) == 2
    assert corpus.score == pytest.approx(score("bleu", TEXTS[:4], REFERENCES[:4]).value)


def test_models_that_share_resamples_are_paired() -> None:
    hard = np.random.default_rng(0).normal(50, 30, 200)
    a, b = build_mean_statistics(hard), build_mean_statistics(hard + 1)
    first, second = bootstrap_scores([a, b], resamples=500)
    assert compute_percentile_interval(second - first) == pytest.approx((1.0, 1.0))
    (alone,) = bootstrap_scores([b], resamples=500, seed=1)
    low, high = compute_percentile_interval(alone - first)
    assert high - low > 5


def test_the_interval_of_a_share_is_as_wide_as_the_binomial_one() -> None:
    (scores,) = bootstrap_scores([build_mean_statistics([100.0] * 60 + [0.0] * 140)], resamples=4000)
    assert compute_percentile_interval(scores) == pytest.approx((30 - 6.35, 30 + 6.35), abs=0.6)
    assert fmean(scores) == pytest.approx(30, abs=0.2)


def test_resamples_repeat_and_do_not_depend_on_other_models() -> None:
    a, b = build_mean_statistics([0.0, 1.0, 5.0]), build_mean_statistics([1.0, 2.0, 2.0])
    together, alone = bootstrap_scores([b, a], resamples=50)[1], bootstrap_scores([a], resamples=50)[0]
    assert together.tolist() == alone.tolist()
    assert bootstrap_scores([a], resamples=50, seed=1)[0].tolist() != alone.tolist()


def test_many_examples_are_drawn_in_several_parts() -> None:
    (scores,) = bootstrap_scores([build_mean_statistics([0.0, 1.0] * 100_000)], resamples=50)
    assert scores.shape == (50,)
    assert len(set(scores.tolist())) > 40
    assert 0.49 < scores.min() < scores.max() < 0.51


def test_a_value_is_the_mean_of_the_examples() -> None:
    assert ExampleStatistics(np.array([[1.0], [2.0], [6.0]])).score == 3.0
