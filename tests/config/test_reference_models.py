"""Teachers and students stated by name, by fields or both, and the placement of teachers."""

from typing import Any

import pytest

from .stub import get_refusal, make_cell

MORE = {"objectives": [{"beta": 0.5, "teacher": ["teacher", "other"]}], "source": {"lmbda": 0}}


def test_size_names_a_model_of_the_scale() -> None:
    assert make_cell(student={"size": "large"}).training == make_cell(student="large").training


def test_fields_beside_size_replace_those_of_the_model() -> None:
    changed = make_cell(student={"size": "large", "layers": 3, "sft": {"steps": 7}}).training.start
    large = make_cell(student="large").training.start
    assert changed.model.architecture is not None and large.model.architecture is not None
    assert changed.model.architecture.layers == 3
    assert changed.model.architecture.width == large.model.architecture.width
    assert changed.sft is not None and large.sft is not None
    assert (changed.sft.steps, changed.sft.batch_size) == (7, large.sft.batch_size)
    assert changed.model.name == "custom"


@pytest.mark.parametrize("place", ["large", "owner/model"])
def test_a_field_is_set_beside_the_name_of_a_model(place: str) -> None:
    fields = {"pretrained" if "/" in place else "size": place, "sft": {"steps": 7}}
    stated = make_cell(teacher=fields, student=fields).training
    overrides = {"teacher.sft.steps": "7", "student.sft.steps": "7"}
    assert make_cell(overrides, teacher=place, student=place).training == stated
    assert stated.teacher.sft is not None
    assert stated.teacher.sft.steps == 7


def test_a_dtype_changes_the_cell_and_not_its_teacher() -> None:
    plain = make_cell(teacher="large").training
    lowered = make_cell(teacher={"size": "large", "dtype": "bfloat16"}).training
    assert lowered.teacher == plain.teacher
    assert lowered.teacher.model.name == "large"
    assert lowered.fingerprint != plain.fingerprint
    assert lowered.get_teacher_placement(0) == ("bfloat16", False)


def test_parking_a_teacher_does_not_change_the_cell() -> None:
    plain, parked = (
        make_cell(teacher=teacher).training for teacher in ("large", {"size": "large", "parked": True})
    )
    assert parked.fingerprint == plain.fingerprint
    assert (plain.get_teacher_placement(0), parked.get_teacher_placement(0)) == ((None, False), (None, True))


def test_each_teacher_has_its_own_placement() -> None:
    training = make_cell(
        teachers={"other": {"size": "small", "dtype": "float16", "parked": True}}, **MORE
    ).training
    assert (training.get_teacher_placement(0), training.get_teacher_placement(1)) == (
        (None, False),
        ("float16", True),
    )
    assert make_cell(teachers={"other": "small"}, **MORE).training.teachers == training.teachers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student": {"size": "smal"}}, "student.size 'smal'"),
        (
            {"student": {"size": "small", "parked": True}},
            "student.parked",
        ),
        ({"teacher": {"dtype": "half"}}, "teacher.dtype: 'half'"),
        (
            {"teacher": {"size": "large", "dtype": "float16"}, "lmbda": 0, "teacher_scores": "full"},
            "teacher.dtype: the teacher",
        ),
        ({"student": {"size": "small", "top_k": 3}}, "student.top_k: is for"),
        ({"teacher": {"size": "small", "tokenizer": "x"}}, "teacher.tokenizer: is for"),
        (
            {"teacher": {"server": "http://127.0.0.1:99999/v1", "model": "m", "top_k": 4}},
            "65535",
        ),
        (
            {"teacher": {"server": "http://127.0.0.1:1/v1", "model": "m", "top_k": 4, "parked": True}},
            "teacher.parked: cannot",
        ),
    ],
)
def test_invalid_model_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    assert message in get_refusal(**fields)
