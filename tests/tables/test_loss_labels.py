"""Labels of losses."""

import json
from typing import Any

import pytest

from gkd_lab.tables.loss_labels import loss_label

SECOND = {"beta": 0.1, "teacher": ["teacher", "second"]}


@pytest.mark.parametrize(
    ("objectives", "text"),
    [
        ([{"beta": 0}], "Forward KL"),
        ([{"beta": 0.1, "weight": 1.0}], "JSD(0.1)"),
        ([{"divergence": "tv"}], "Total variation"),
        ([{"beta": 1}, {"type": "cross_entropy", "weight": 0.5}], "Reverse KL + 0.5 cross entropy"),
        ([{"type": "cross_entropy", "weight": 1, "final_weight": 0}], "1 to 0 cross entropy"),
        (
            [{"beta": 0, "teacher_temperature": 2, "student_temperature": 2, "square_temperature": True}],
            "Forward KL at T = 2 times T²",
        ),
        ([{"beta": 0, "teacher_temperature": 0.3}], "Forward KL at the teacher's T = 0.3"),
        ([{**SECOND, "mixture": [0.7, 0.3]}], "JSD(0.1) of 0.7 teacher + 0.3 second"),
        (
            [{"beta": 0.1, "teachers": ["teacher", "second"], "weights": [0.7, 0.3]}],
            "JSD(0.1) of 0.7 teacher + 0.3 second",
        ),
        ([SECOND], "JSD(0.1) of teacher and second"),
        ([{**SECOND, "routed": True}], "JSD(0.1) of teacher or second, by row"),
        ([{"beta": 0.1, "teacher": "start"}], "JSD(0.1) of start"),
        ([{"type": "hidden_states", "layers": "uniform", "weight": 0.1}], "0.1 hidden states (uniform)"),
    ],
)
def test_a_loss_has_a_label_of_one_line(objectives: list[dict[str, Any]], text: str) -> None:
    assert loss_label(objectives) == text
    assert loss_label(json.dumps(objectives)) == text
