"""Token classification: things, praise and blame in a made review (reviews.py).

    prompt  the soup was not good .
    target  O THING O O BLAME O

Real rows have `tokens` and `tags`, lists of equal length.
"""

import random
from collections.abc import Mapping
from typing import Any

from gkd_lab.tasks import reviews
from gkd_lab.tasks.made_data import build_generator
from gkd_lab.tasks.scale_defaults import define_classifier_scale
from gkd_lab.tasks.task import Row, Task

GENERATOR_VERSION = "tagging-made-1"


def parse_row(raw: Mapping[str, Any]) -> Row:
    """Return a raw row with `tokens`, single words, and their `tags` as a Row; ValueError otherwise."""
    tokens, tags = raw.get("tokens"), raw.get("tags")
    if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags) or not tokens:
        raise ValueError("fields 'tokens' and 'tags' must be lists of the same length, one entry at least")
    if any(not isinstance(token, str) or len(token.split()) != 1 for token in tokens):
        raise ValueError("field 'tokens': each must be one word, without blanks")
    unknown_tags = [tag for tag in tags if tag not in reviews.TAGS]
    if unknown_tags:
        raise ValueError(f"field 'tags': {unknown_tags[0]!r} is not a tag; valid: {', '.join(reviews.TAGS)}")
    return Row(" ".join(tokens), " ".join(tags), (" ".join(tags),))


def _draw_tagged_review(random_numbers: random.Random) -> tuple[str, str]:
    """Return a random (review text, its tags joined by spaces), one tag per word."""
    review = reviews.draw_review(random_numbers)
    return review.text, " ".join(review.tags)


TASK = Task(
    name="tagging",
    family="token-classification",
    metrics=("tag_f1_macro", "tag_accuracy"),
    generators={"made": build_generator(_draw_tagged_review, GENERATOR_VERSION)},
    parse_row=parse_row,
    columns={"prompt": "tokens", "target": "tags"},
    labels=reviews.TAGS,
    scales={"nano": define_classifier_scale()},
)
