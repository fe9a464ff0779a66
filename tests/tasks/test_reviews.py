"""Made reviews against values worked out by hand, and real rows of the three tasks that read them."""

import random
import re
from typing import Any

import pytest

from gkd_lab.tasks import get_task, load_rows, reviews
from gkd_lab.tasks.classification import LABELS

TASKS = ("classification", "tagging", "scoring")
CLAUSE = re.compile(r"(but )?the \w+ was (?:(quite|very|truly|not|hardly) )?(\w+)")


def score_text(text: str) -> int:
    """Score a review from its text alone."""
    total = 0
    for but, factor, opinion in CLAUSE.findall(text):
        times = {"very": 2, "truly": 2, "not": -1, "hardly": -1}.get(factor, 1)
        value = times * reviews.OPINION_VALUES.get(opinion, 0)  # an aside gives none
        total += 2 * value if but else value
    return total


def test_the_docstring_example_has_score_7() -> None:
    assert score_text("the soup was not good , we came on Monday , but the staff was very lovely .") == 7


@pytest.mark.parametrize("seed", range(30))
def test_the_score_of_a_review_follows_from_its_text(seed: int) -> None:
    review = reviews.draw_review(random.Random(seed))
    assert review.score == score_text(review.text)
    assert len(review.words) == len(review.tags)
    opinion_tags = {
        word: tag
        for word, tag in zip(review.words, review.tags, strict=True)
        if word in reviews.OPINION_VALUES
    }
    assert all(tag in ("PRAISE", "BLAME") for tag in opinion_tags.values())


def test_not_negates_an_opinion() -> None:
    rows = load_rows(get_task("tagging"), "made", split="train", count=200)
    tagged = [dict(zip(r.prompt.split(), r.target.split(), strict=True)) for r in rows if " not " in r.prompt]
    pairs = [(r.prompt.split(), r.target.split()) for r in rows]
    after = [(words[n + 1], tags[n + 1]) for words, tags in pairs for n, w in enumerate(words) if w == "not"]
    assert tagged and after
    assert all((tag == "BLAME") == (reviews.OPINION_VALUES[word] > 0) for word, tag in after)


def test_the_three_review_tasks_agree() -> None:
    for row in load_rows(get_task("classification"), "made", split="test", count=50):
        score = score_text(row.prompt)
        assert row.target == LABELS[1 + (score > 0) - (score < 0)]
    for row in load_rows(get_task("scoring"), "made", split="test", count=50):
        assert float(row.target) == score_text(row.prompt) / 4


def test_all_labels_and_tags_occur() -> None:
    rows = load_rows(get_task("classification"), "made", split="train", count=300)
    assert {row.target for row in rows} == set(LABELS)
    tags = {
        tag
        for row in load_rows(get_task("tagging"), "made", split="train", count=50)
        for tag in row.target.split()
    }
    assert tags == set(reviews.TAGS)


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_prompt(name: str) -> None:
    train = {row.prompt for row in load_rows(get_task(name), "made", split="train", count=300)}
    test = {row.prompt for row in load_rows(get_task(name), "made", split="test", count=300)}
    assert not train & test and max(len(text.split()) for text in train | test) <= 56


@pytest.mark.parametrize(
    ("name", "raw", "target"),
    [
        ("classification", {"text": "fine", "label": "positive"}, "positive"),
        ("tagging", {"tokens": ["a", "soup"], "tags": ["O", "THING"]}, "O THING"),
        ("scoring", {"text": "fine", "label": 2}, "2.0"),
    ],
)
def test_real_rows_are_parsed(name: str, raw: dict[str, Any], target: str) -> None:
    assert get_task(name).parse_row(raw).target == target


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("classification", {"text": "fine", "label": "positiv"}, "did you mean 'positive'"),
        ("classification", {"text": "fine"}, "no field 'label'"),
        ("tagging", {"tokens": ["a"], "tags": []}, "'tags' .*same length"),
        ("tagging", {"tokens": ["a b"], "tags": ["O"]}, "must be one word"),
        ("tagging", {"tokens": ["a"], "tags": ["X"]}, "'X' .*O, THING"),
        ("scoring", {"text": "fine", "label": "2"}, "number, got '2'"),
        ("scoring", {"text": "fine", "label": float("nan")}, "must be a number"),
    ],
)
def test_invalid_rows_are_refused_with_the_field(name: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task(name).parse_row(raw)
