"""Settings merged layer by layer: values as merge_settings gives them, each with the layer that stated it."""

import pytest

from gkd_lab.config.errors import Origin
from gkd_lab.config.settings import merge_settings
from gkd_lab.config.value_sources import SourcedSettings, ValueSource

DEFAULT, AXIS = ValueSource("task"), ValueSource("axis", ("grid", "steps"))
LAYERS = [
    ({"steps": 1, "data": {"source": "made", "train": 5}, "student": "small", "teachers": {}}, DEFAULT),
    ({"data": {"train": 7}, "student": {"size": "base", "sft": {"rows": 9}}}, ValueSource("file", ())),
    ({"data": {"train": 8}}, ValueSource("file", ("per_task", "text"))),
    ({"steps": 2}, AXIS),
]


@pytest.fixture
def merged() -> SourcedSettings:
    settings = SourcedSettings()
    for layer, source in LAYERS:
        settings.merge(layer, source)
    return settings


def test_the_values_are_those_of_merge_settings(merged: SourcedSettings) -> None:
    assert merged.values == merge_settings(*(layer for layer, _ in LAYERS))


def test_each_value_has_the_source_of_the_layer_that_won(merged: SourcedSettings) -> None:
    assert merged.find(("steps",)) == (AXIS,)
    assert merged.find(("data", "source")) == (DEFAULT,)
    assert merged.find(("data", "train")) == (ValueSource("file", ("per_task", "text", "data", "train")),)
    assert merged.find(("student", "sft", "rows")) == (ValueSource("file", ("student", "sft", "rows")),)
    assert merged.find(("teachers",)) == (DEFAULT,)
    assert merged.find(("nothing",)) == ()


def test_a_section_has_all_sources_of_its_values(merged: SourcedSettings) -> None:
    train = ValueSource("file", ("per_task", "text", "data", "train"))
    assert set(merged.find(("data",))) == {DEFAULT, train}


def test_a_part_of_a_list_has_the_source_of_the_list_at_its_own_place() -> None:
    settings = SourcedSettings()
    settings.merge({"objectives": ({"beta": 0.5},)}, ValueSource("file", ()))
    assert settings.find(("objectives", 0, "beta")) == (ValueSource("file", ("objectives", 0, "beta")),)


def test_merged_settings_keep_their_sources_in_others(merged: SourcedSettings) -> None:
    settings = SourcedSettings()
    settings.merge({"steps": 5, "beta": 1}, DEFAULT)
    settings.merge_sourced(merged, exclude=("student",))
    assert settings.values == {"beta": 1, **{k: v for k, v in merged.values.items() if k != "student"}}
    assert settings.find(("steps",)) == (AXIS,)
    assert settings.find(("beta",)) == (DEFAULT,)
    assert settings.find(("student", "size")) == ()


def test_a_name_that_becomes_a_section_keeps_its_source() -> None:
    settings = SourcedSettings()
    settings.merge({"student": "small"}, DEFAULT)
    settings.rename_leaf("student", ("size",))
    settings.merge({"student": {"sft": {"rows": 3}}}, AXIS)
    assert settings.values == {"student": {"size": "small", "sft": {"rows": 3}}}
    assert settings.find(("student", "size")) == (DEFAULT,)
    assert settings.find(("student", "sft", "rows")) == (AXIS,)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (ValueSource("scale"), "default of all tasks at nano"),
        (ValueSource("task"), "default of text at nano"),
        (ValueSource("data"), "default of text at nano, for data that is not made"),
        (ValueSource("student", detail="the student base"), "default of text at nano, for the student base"),
        (ValueSource("file", ("beta",)), "mine.yaml:3"),
        (ValueSource("file", ("per_task", "text", "steps")), "mine.yaml:7 (per_task.text)"),
        (ValueSource("axis", ("grid", "lmbda")), "axis lmbda, mine.yaml:5"),
        (ValueSource("axis", ("grid", "seed")), "axis seed, --set seed"),
        (ValueSource("file", ("data", "train")), "--set data.train"),
        (ValueSource("method", ("method",), "imitkd"), "method imitkd, mine.yaml:9"),
        (ValueSource("derived", detail="4 times the width"), "4 times the width"),
        (ValueSource("built-in"), "built-in default"),
    ],
)
def test_a_source_is_described_by_its_place(source: ValueSource, text: str) -> None:
    lines = {
        ("beta",): 3,
        ("grid",): 4,
        ("grid", "lmbda"): 5,
        ("per_task",): 6,
        ("per_task", "text"): 6,
        ("per_task", "text", "steps"): 7,
        ("method",): 9,
        ("data", "train"): 11,
    }
    origin = Origin("folder/mine.yaml", lines, set_fields=("seed", "data.train"))
    assert source.describe(origin, "text", "nano") == text
