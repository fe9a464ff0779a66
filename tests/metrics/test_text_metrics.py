"""Scores against the libraries themselves, hand values, and the documented ends."""

import math
import re
import warnings
from statistics import fmean

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from gkd_lab.metrics import METRICS, Metric, MetricInput, Score, extract_answer, score, score_many
from gkd_lab.metrics import rouge as rouge_module
from gkd_lab.metrics.score import CLASSIFICATION_METRICS, CorpusStatistics
from gkd_lab.metrics.scored_predictions import Prediction, score_predictions
from gkd_lab.tables.example_statistics import build_example_statistics

PREDICTIONS = [
    "The cat sat on the mat.",
    "Der Zug fährt am Montag um halb vier ab",
    "running dogs",
    "",
]
AGAINST_REFERENCES = [metric for metric in METRICS if metric not in ("self_bleu", *CLASSIFICATION_METRICS)]
REFERENCES = [
    ["The cat is on the mat.", "A cat sat on a mat."],
    ["Der Zug fährt am Montag um halb fünf ab"],
    ["the dog runs", "dogs run"],
    ["something"],
]


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_is_rouge_scores_with_the_best_reference(stem: bool) -> None:
    variants = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(variants, use_stemmer=stem)
    scores = score_many(variants, PREDICTIONS, REFERENCES, use_stemmer=stem)
    for variant in variants:
        expected = [
            100 * max(scorer.score(text, prediction)[variant].fmeasure for text in texts)
            for prediction, texts in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert scores[variant].per_example == pytest.approx(expected)
        assert scores[variant].value == pytest.approx(fmean(expected))
        assert f"|stem:{'yes' if stem else 'no'}|refs:best|" in scores[variant].signature


def test_rouge_by_hand() -> None:
    # 4 of 5 and 4 of 6 words: F = 2 * 4 / 11; bigrams 2 of 4 and 2 of 5: F = 2 * 2 / 9
    scores = score_many(["rouge2", "rouge1"], ["a b c d e"], [["a b c x d y"]])
    assert list(scores) == ["rouge2", "rouge1"]
    assert scores["rouge1"].value == pytest.approx(100 * 8 / 11)
    assert scores["rouge2"].value == pytest.approx(100 * 4 / 9)


def test_several_rouge_variants_read_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = rouge_scorer.RougeScorer.score
    monkeypatch.setattr(
        rouge_module.rouge_scorer.RougeScorer,
        "score",
        lambda self, target, prediction: (
            calls.append((target, prediction)) or original(self, target, prediction)
        ),
    )
    score_many(["rouge1", "rouge2", "rougeL"], ["a b", "c"], [["a b", "b a"], ["c"]])
    assert calls == [("a b", "a b"), ("b a", "a b"), ("c", "c")]


def test_bleu_and_chrf_are_sacrebleus_corpus_scores() -> None:
    first, second = [texts[0] for texts in REFERENCES], [texts[-1] for texts in REFERENCES]
    references = [[texts[0], texts[-1]] for texts in REFERENCES]
    bleu = score("bleu", PREDICTIONS, references)
    chrf = score("chrf", PREDICTIONS, references)
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [first, second]).score)
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [first, second]).score)
    assert 0 < bleu.value < 100
    assert bleu.per_example[1] == pytest.approx(sacrebleu.sentence_bleu(PREDICTIONS[1], [first[1]]).score)
    version = re.escape(sacrebleu.__version__)
    assert re.fullmatch(
        rf"bleu\|nrefs:2\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:{version}",
        bleu.signature,
    )
    assert re.fullmatch(rf"chrf\|nrefs:2\|.*nc:6\|nw:0\|.*version:{version}", chrf.signature)


def test_sentence_bleu_uses_the_effective_order() -> None:
    assert score("bleu", ["a b"], [["a b"]]).per_example == pytest.approx([100])


def test_bleu_by_hand() -> None:
    # 4-gram precisions 4/5, 3/4, 2/3, 1/2 and no brevity penalty: their geometric mean
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert score("bleu", ["a b c d x"], [["a b c d y"]]).value == pytest.approx(expected)


def test_examples_may_have_different_numbers_of_references() -> None:
    alone = score("bleu", ["a b c d e", "f g h i j"], [["a b c d e"], ["f g h i j"]])
    mixed = score("bleu", ["a b c d e", "f g h i j"], [["a b c d e"], ["x", "f g h i j"]])
    assert alone.value == mixed.value == pytest.approx(100)


def test_accuracy_counts_correct_and_missing_answers() -> None:
    result = score(
        "accuracy",
        ["1 #### 1,000", "#### 2", "no idea", "#### 4"],
        [["#### 1000"], ["#### 3"], ["#### 3"], ["#### 5", "#### 4"]],
    )
    assert result.value == 50
    assert result.per_example == [100, 0, 0, 100]
    assert result.rates == {
        "extraction_failure_rate": 0.25,
        "reference_without_answer_rate": 0,
        "empty_prediction_rate": 0,
    }
    assert "rule:gsm8k" in result.signature


def test_a_reference_without_an_answer_is_wrong_and_counted() -> None:
    result = score("accuracy", ["no number"], [["none here"]])
    assert (result.value, result.rates["reference_without_answer_rate"]) == (0, 1)


def test_exact_match_ignores_outer_space_only() -> None:
    result = score("exact_match", ["a b\n", "A b", "c"], [["a b"], ["a b"], ["d", " c "]])
    assert result.per_example == [100, 0, 100]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("a #### 1,234 b", "1234"), ("#### -7.5", "-7.5"), ("#### x", None), ("", None)],
)
def test_answers_are_extracted_by_the_rule(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize("metric", AGAINST_REFERENCES)
@pytest.mark.parametrize(("prediction", "reference"), [("", "a b"), ("a b", ""), (" ", "a")])
def test_an_empty_side_scores_zero(metric: str, prediction: str, reference: str) -> None:
    result = score(metric, [prediction], [[reference]])
    assert (result.value, result.per_example) == (0, [0])
    assert result.rates["empty_prediction_rate"] == (not prediction.strip())


@pytest.mark.parametrize("metric", AGAINST_REFERENCES)
def test_two_empty_texts_score_only_by_exact_match(metric: str) -> None:
    assert score(metric, [""], [[""]]).value == (100 if metric == "exact_match" else 0)


@pytest.mark.parametrize("metric", AGAINST_REFERENCES)
def test_a_long_document_is_scored_fast(metric: str) -> None:
    document = " ".join(f"w{n % 997}" for n in range(20_000))
    for prediction, reference in (("w1 w2 x", document), (document, "w1 w2 x")):
        assert 0 <= score(metric, [prediction], [[reference]]).value < 1


@pytest.mark.parametrize("metric", AGAINST_REFERENCES)
def test_a_perfect_prediction_scores_a_hundred(metric: str) -> None:
    text = "so the sum of them is #### 12"
    result = score(metric, [text, text], [[text], [text]])
    assert result.value == pytest.approx(100)
    assert len(result.per_example) == 2
    assert math.isclose(fmean(result.per_example), 100)


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "message"),
    [
        ("rouge3", ["a"], [["a"]], "metric 'rouge3'"),
        ("blue", ["a"], [["a"]], "mean 'bleu'?"),
        ("bleu", [], [], "0 predictions"),
        ("bleu", ["a", "b"], [["a"]], "2 predictions, 1 lists"),
        ("bleu", ["a"], [[]], "references[0] is empty"),
        ("bleu", ["a"], ["a"], "got 'a'"),
    ],
)
def test_invalid_input_is_refused_with_the_reason(
    metric: str, predictions: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        score(metric, predictions, references)


def test_a_registered_corpus_metric_is_scored_and_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length ratio of all texts to all references: the mean of the examples' ratios is another number."""

    def count_characters(inputs: MetricInput) -> CorpusStatistics:
        pairs = zip(inputs.predictions, inputs.references, strict=True)
        lengths = np.array([[float(len(text)), float(len(texts[0]))] for text, texts in pairs])
        return CorpusStatistics(lengths, lambda summed: 100.0 * summed[0] / summed[1])

    def score_length(inputs: MetricInput) -> Score:
        statistics = count_characters(inputs)
        value = statistics.compute_score(statistics.per_example.sum(axis=0).tolist())
        return Score(value, [value] * len(inputs.predictions), "length|unit:character")

    monkeypatch.setitem(METRICS, "length", Metric(score_length, count_characters))
    predictions = [Prediction("p", "a" * n, ("b" * 10,), 1, True) for n in (1, 5, 9, 20)]
    scores, rows = score_predictions(["length"], predictions)
    assert scores["length"]["value"] == pytest.approx(100 * 35 / 40)
    assert 10 <= scores["length"]["low"] < 87.5 < scores["length"]["high"] <= 200
    sample = build_example_statistics("length", rows, [0.0] * 4)
    assert sample.statistics.tolist() == [[1, 10], [5, 10], [9, 10], [20, 10]]
    assert sample.score == pytest.approx(87.5)


# ---- texts of other scripts ----


@pytest.mark.parametrize("text", ["今天天气很好", "สวัสดี", "Привет, мир", "नमस्ते दुनिया", "Füße"])
def test_equal_texts_of_any_script_have_rouge_100_with_unicode_words(text: str) -> None:
    names = [f"{name}_unicode" for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")]
    scores = score_many(names, [f"{text} {text}"], [[f"{text} {text}"]])
    assert {score.value for score in scores.values()} == {100.0}
    assert all("|words:unicode" in score.signature for score in scores.values())


def test_unicode_words_tell_umlauts_apart_and_equal_those_of_english() -> None:
    assert score("rouge1_unicode", ["Füße"], [["Fäße"]]).value == 0
    english = ["The 3 cats sat, on a mat."], [["A cat sat on the mats: 3 cats."]]
    assert score("rougeL_unicode", *english).value == score("rougeL", *english).value
    composed = score("rouge1_unicode", ["u\u0308ber"], [["\u00fcber"]])
    assert composed.value == 100


def test_rouge_warns_where_most_of_a_text_is_not_read() -> None:
    with pytest.warns(UserWarning, match="use rougeL_unicode"):
        assert score("rougeL", ["今天天气很好"], [["今天天气很好"]]).value == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score("rougeL", ["Die Füße"], [["Die Füße sind müde"]])
        score("rougeL", ["", "3 + 4"], [["."], ["7"]])


@pytest.mark.parametrize("text", ["今天天气很好。", "สวัสดีชาวโลก", "これはペンです"])
def test_bleu_warns_of_scripts_without_spaces_between_words(text: str) -> None:
    with pytest.warns(UserWarning, match="bleu splits words at spaces.*use chrf"):
        assert score("bleu", [text], [[text]]).value == 0
    with pytest.warns(UserWarning, match="self_bleu splits words at spaces"):
        score_many(["self_bleu"], [text] * 2, [[text]] * 2, prompts=[0, 0])


@pytest.mark.parametrize(
    "text",
    [
        "Die Füße sind müde.",
        "Привет, мир",
        "안녕하세요 세계",
        "مرحبا بالعالم",
        "今天 天气 很 好 。",
        "😀 👍🏽",
        "",
    ],
)
def test_bleu_warns_of_no_other_script(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_many(["bleu", "chrf"], [text], [[text]])
        score_many(["self_bleu"], [text] * 2, [[text]] * 2, prompts=[0, 0])
    assert scores["chrf"].value == (100 if text else 0)
