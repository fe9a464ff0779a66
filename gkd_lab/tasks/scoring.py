"""Regression: a quarter of the score of a made review (reviews.py).

    prompt  the soup was not good , but the staff was very lovely .
    target  1.75

Real rows have `text` and `label`, a number.
"""

import math
import random
from collections.abc import Mapping
from typing import Any

from gkd_lab.tasks import reviews
from gkd_lab.tasks.made_data import build_generator
from gkd_lab.tasks.scale_defaults import define_classifier_scale
from gkd_lab.tasks.task import Row, Task, read_text_field

GENERATOR_VERSION = "scoring-made-1"


def parse_row(raw: Mapping[str, Any]) -> Row:
    """Return a raw row with `text` and `label`, a finite number, as a Row; ValueError otherwise."""
    value = raw.get("label")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"field 'label' must be a number, got {value!r:.60}")
    return Row(read_text_field(raw, "text"), repr(float(value)), (repr(float(value)),))


def _draw_scored_review(random_numbers: random.Random) -> tuple[str, str]:
    """Return a random (review text, a quarter of its score as text)."""
    review = reviews.draw_review(random_numbers)
    return review.text, repr(review.score / 4)


TASK = Task(
    name="scoring",
    family="regression",
    metrics=("pearson", "spearman"),
    generators={"made": build_generator(_draw_scored_review, GENERATOR_VERSION)},
    parse_row=parse_row,
    columns={"prompt": "text", "target": "label"},
    scales={"nano": define_classifier_scale(objectives=[{"type": "squared_error"}])},
)
