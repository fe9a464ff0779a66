"""YAML 1.2's core schema, lines of values, and errors of reading."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import ConfigError
from gkd_lab.config.yaml_files import parse_yaml, read_yaml_mapping


@pytest.mark.parametrize(
    "text", ["no", "off", "yes", "y", "010", "-01", "1_000", "1:30", "0x10", "0o10", "2020-01-02"]
)
def test_words_and_numbers_of_yaml_1_1_are_text(text: str) -> None:
    assert parse_yaml(f"[{text}]") == [text]
    assert parse_yaml(f"value: {text}") == {"value": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-3", -3),
        ("+3", 3),
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("1E+05", 1e5),
        (".001", 0.001),
        ("5.", 5.0),
        ("-0.25", -0.25),
        (".inf", float("inf")),
        ("-.INF", -float("inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("'010'", "010"),
    ],
)
def test_numbers_booleans_and_null_are_those_of_the_core_schema(text: str, value: Any) -> None:
    (parsed,) = parse_yaml(f"[{text}]")
    assert parsed == value
    assert type(parsed) is type(value)


def test_minus_zero_is_zero_and_an_empty_value_is_null() -> None:
    (zero,) = parse_yaml("[-0.0]")
    assert str(zero) == "0.0"
    assert parse_yaml("value:\nother: 1") == {"value": None, "other": 1}


def refused(text: str, folder: Path) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml_mapping(path, "task: arithmetic")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 3\nseed: 1\nsteps: 4\n", ":3: not valid YAML: 'steps' is given twice, first in line 1"),
        ("a: 1\nb: [1\n", ":3: not valid YAML"),
        ("a: 1\nb: c: d\n", ":2: not valid YAML"),
        ("a: !!int 010\n", ":1: not valid YAML: '010' is not a number"),
        ("a: !!python/object:os.system x\n", ":1: not valid YAML"),
        ("a: &a [*a]\n*a : 1", ": not valid YAML"),
        ("a: " + "[" * 5000, ": not valid YAML: it is nested too deeply"),
        ("# nothing\n", ": the file is empty"),
    ],
)
def test_what_cannot_be_read_is_reported_with_file_and_line(text: str, expected: str, tmp_path: Path) -> None:
    message = refused(text, tmp_path)
    assert expected in message or message.split(": ", 1)[1].startswith(expected.lstrip(": "))


def test_an_anchor_and_a_merge_keep_their_meaning(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\n")
    content, origin = read_yaml_mapping(path, "a: 1")
    assert content == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}}
    assert origin.format_place(("other", "b")) == f"{path}:4"
    assert origin.format_place(("nowhere",)) == str(path)
