"""Several teachers in an experiment: their names, their numbers, and what cannot be asked of them."""

from typing import Any

import pytest

from gkd_lab.config.cell import Training, list_references

from .stub import get_refusal, make_cell, make_grid

SMALL = {"layers": 1, "width": 8, "heads": 2}


def training(*objectives: dict[str, Any], **changes: Any) -> Training:
    return make_cell(objectives=list(objectives), source={"lmbda": 0.5}, **changes).training


def test_teachers_are_numbered_as_they_appear() -> None:
    one = training(
        {"beta": 0.1, "teacher": "small"},
        {"beta": 0.5},
        {"beta": 0.9, "teacher": ["teacher", "start", "small"], "mixture": [0.5, 0.25, 0.25]},
        teachers={"small": SMALL},
    )
    assert [objective.teachers for objective in one.objectives] == [(1,), (0,), (0, 2, 1)]  # type: ignore[union-attr]
    assert one.teachers[1] == one.start
    assert one.teachers[0].model.architecture is not None
    assert one.teachers[0].model.architecture.width == 8


def test_older_names_of_fields_describe_the_same_cell() -> None:
    old = {"teacher": ["teacher", "small"], "mixture": [0.7, 0.3], "mixture_temperatures": [1, 2]}
    new = {"teachers": ["teacher", "small"], "weights": [0.7, 0.3], "temperatures": [1, 2]}
    older, newer = (training({"beta": 0.1, **names}, teachers={"small": SMALL}) for names in (old, new))
    assert older == newer
    assert older.fingerprint == newer.fingerprint


def test_names_are_not_part_of_a_cell() -> None:
    alike = [
        make_cell(objectives=[{"beta": 0.1, "teacher": name}], source={"lmbda": 0}, teachers={name: SMALL})
        for name in ("small", "other")
    ]
    assert alike[0].fingerprint == alike[1].fingerprint
    plain = make_cell(objectives=[{"beta": 0.1}], source={"lmbda": 0})
    assert plain.training == make_cell(lmbda=0, beta=0.1).training


def test_what_the_data_calls_teachers_is_part_of_a_routed_cell() -> None:
    cells = [
        make_cell(
            objectives=[{"beta": 0.1, "teacher": ["teacher", name], "routed": True}],
            source={"lmbda": 0},
            teachers={name: SMALL},
        )
        for name in ("small", "other")
    ]
    assert cells[0].fingerprint != cells[1].fingerprint


def test_all_teachers_of_a_cell_are_built_once() -> None:
    found = make_grid(
        grid={"seed": [0, 1]},
        objectives=[{"beta": 0.1, "teacher": ["teacher", "small", "start"]}],
        source={"lmbda": 0},
        teachers={"small": SMALL},
    )
    assert [one.role for one in list_references(found.cells)] == ["teacher", "start", "teacher"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"teacher": "smal"}, "unknown teacher 'smal'; did you mean 'small'"),
        ({"teacher": ["small", "small"]}, "names a teacher twice"),
        ({"teacher": ["teacher", "small"], "mixture": [1.0]}, "1 weights for 2 teachers"),
        ({"teacher": ["teacher", "small"], "mixture": [0.9, 0.2]}, "must sum to 1, not 1.1"),
        ({"teacher": "small", "routed": True}, "routed takes one of several teachers"),
        ({"teacher": []}, "teachers []: name at least one"),
        ({"teacher": "start"}, "every divergence is from `start`"),
        ({"teachers": [0]}, "unknown teacher 0"),
        ({"teacher": "small", "teachers": "small"}, "teacher is the older name of teachers"),
    ],
)
def test_a_teacher_that_cannot_be_asked_for_is_refused(objective: dict[str, Any], message: str) -> None:
    listed = [{"beta": 0.5, **objective}]
    assert message in get_refusal(objectives=listed, source={"lmbda": 0}, teachers={"small": SMALL})


def test_the_start_at_another_temperature_has_something_to_teach() -> None:
    hold = {"beta": 0.5, "teacher": "start"}
    for more in ({"teacher_temperature": 0.5}, {"student_temperature": 2}):
        assert training({**hold, **more}).teachers == (training({"beta": 0.5}).start,)
    assert training(hold, dropout=0.1).dropout == 0.1


def test_a_mixture_of_one_is_that_one() -> None:
    mixed, plain = (
        make_cell(objectives=[{"beta": 0.5, **more}], source={"lmbda": 0}) for more in ({"mixture": [1]}, {})
    )
    assert mixed.fingerprint == plain.fingerprint


def test_a_teacher_that_nothing_names_is_no_part_of_a_cell() -> None:
    listed = [{"beta": 0.5}]
    one = make_cell(objectives=listed, source={"lmbda": 0}, teachers={"small": SMALL})
    assert one.training == make_cell(objectives=listed, source={"lmbda": 0}).training


def test_weights_that_are_all_0_are_refused() -> None:
    listed = [{"beta": 0.5, "weight": 0}, {"type": "cross_entropy", "weight": 0}]
    message = get_refusal(objectives=listed, source={"lmbda": 0})
    assert message.endswith("objectives: all weights are 0, so nothing would be learnt; give one a weight")


def test_a_reserved_name_is_refused() -> None:
    listed = [{"beta": 0.5, "teacher": "start"}]
    message = get_refusal(objectives=listed, source={"lmbda": 0}, teachers={"start": SMALL})
    assert "the name 'start' is reserved" in message
