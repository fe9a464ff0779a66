"""Sequence classification: the sentiment of a made review, positive, negative or mixed (reviews.py).

    prompt  the soup was not good , but the staff was very lovely .
    target  positive

Real rows have `text` and `label`, one of these three.
"""

import random
from collections.abc import Mapping
from typing import Any

from gkd_lab.config.errors import suggest_choices
from gkd_lab.tasks import reviews
from gkd_lab.tasks.made_data import build_generator
from gkd_lab.tasks.scale_defaults import define_classifier_scale
from gkd_lab.tasks.task import Row, Task, read_text_field

GENERATOR_VERSION = "classification-made-1"
LABELS = ("negative", "mixed", "positive")


def parse_row(raw: Mapping[str, Any]) -> Row:
    """Return a raw row with `text` and `label`, one of LABELS, as a Row; ValueError otherwise."""
    text, label = read_text_field(raw, "text"), read_text_field(raw, "label")
    if label not in LABELS:
        raise ValueError(f"field 'label': {label!r} is not a label; {suggest_choices(label, LABELS)}")
    return Row(text, label, (label,))


def _draw_labelled_review(random_numbers: random.Random) -> tuple[str, str]:
    """Return a random (review text, label); the label is the sign of the review's score."""
    review = reviews.draw_review(random_numbers)
    return review.text, LABELS[1 + (review.score > 0) - (review.score < 0)]


TASK = Task(
    name="classification",
    family="sequence-classification",
    metrics=("label_accuracy", "f1_macro", "matthews"),
    generators={"made": build_generator(_draw_labelled_review, GENERATOR_VERSION)},
    parse_row=parse_row,
    columns={"prompt": "text", "target": "label"},
    labels=LABELS,
    scales={"nano": define_classifier_scale()},
)
