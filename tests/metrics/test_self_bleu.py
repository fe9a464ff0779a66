"""Self-BLEU: its ends, what it is taken over, and what it refuses."""

import pytest

from gkd_lab.metrics import score
from gkd_lab.metrics.self_bleu import compute_self_bleu

ONE = "the train leaves the station at noon"


def test_equal_texts_score_a_hundred_and_texts_without_a_common_word_nothing() -> None:
    assert compute_self_bleu([ONE, ONE, ONE]) == pytest.approx([100, 100, 100])
    assert compute_self_bleu(["a b c d e", "f g h i j"]) == [0, 0]


def test_self_bleu_of_texts_that_share_a_part() -> None:
    # 1- to 4-gram precisions 6/7, 5/6, 4/5, 3/4 on both sides, equally long
    scored = compute_self_bleu([ONE, "the train leaves the station at night"])
    assert scored == pytest.approx([100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25] * 2)


def test_a_text_of_fewer_than_four_words_stays_below_a_hundred() -> None:
    # no 3- nor 4-grams: 0 of 1, smoothed to 0.1 of 1
    assert compute_self_bleu(["a b", "a b"]) == pytest.approx([100 * 0.1**0.5] * 2)


def test_texts_are_compared_within_their_prompt() -> None:
    texts = [ONE, ONE, "a b c d e", "f g h i j"]
    scored = score("self_bleu", texts, [[""]] * 4, prompts=[1, 1, 2, 2])
    assert scored.per_example == pytest.approx([100, 100, 0, 0])
    assert scored.value == pytest.approx(50)
    assert scored.signature.startswith("self_bleu|order:4|samples:2|smooth:method1|tok:nltk|version:")


def test_an_empty_text_scores_0() -> None:
    assert compute_self_bleu(["", ONE]) == [0, 0]


@pytest.mark.parametrize("prompts", [None, [0, 1, 2], [0, 0, 1]])
def test_self_bleu_needs_equal_numbers_of_texts_per_prompt(prompts: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"self_bleu .*samples: 8"):
        score("self_bleu", [ONE] * 3, [[""]] * 3, prompts=prompts)


def test_self_bleu_needs_a_prompt_number_per_prediction() -> None:
    with pytest.raises(ValueError, match="2 predictions, 3 prompts"):
        score("self_bleu", [ONE] * 2, [[""]] * 2, prompts=[0, 0, 0])
