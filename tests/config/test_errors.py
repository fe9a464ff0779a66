"""Messages name the field, the value, the reason and the valid choices."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import ConfigError, read_experiment

from .stub import get_refusal

WRONG: list[tuple[dict[str, Any], str]] = [
    # unknown fields, at every depth, with the nearest name of that depth
    ({"lmbd": 0}, "mean 'lmbda'?"),
    ({"grid": {"lmbd": [0]}}, "field 'grid.lmbd'"),
    ({"grid": {"data.trian": [0]}}, "mean 'data.train'?"),
    ({"per_task": {"sums": {"stps": 3}}}, "field 'per_task.sums.stps'"),
    (
        {"student": {"wdth": 3}},
        "mean 'width'?",
    ),
    ({"grid": {"student": [{"wdth": 3}]}}, "field 'grid.student[0].wdth'"),
    ({"student": {"sft": {"stps": 3}}}, "mean 'steps'?"),
    ({"data": {"sourc": "x"}}, "mean 'source'?"),
    ({"evaluations": [{"decodin": "x"}]}, "'evaluations[0].decodin'"),
    ({"paper": {"figure": []}}, "mean 'figures'?"),
    # values out of range, of the wrong kind, or not among the choices
    ({"lmbda": 1.5}, "lmbda: 1.5"),
    ({"lmbda": -0.1}, "lmbda: -0.1"),
    ({"grid": {"lmbda": [0, 1.5]}}, "grid.lmbda[1]: 1.5"),
    ({"beta": "abc"}, "beta: 'abc'"),
    ({"temperature": 0}, "temperature: 0"),
    ({"grid": {"temperature": [float("inf")]}}, "grid.temperature[0]: inf"),
    ({"grid": {"lmbda": [float("nan")]}}, "grid.lmbda[0]: nan"),
    ({"warmup_steps": -1}, "warmup_steps: -1"),
    ({"steps": 2.5}, "steps: 2.5"),
    ({"grid": {"lmbda": [None]}}, "grid.lmbda[0]: None"),
    ({"student": 3}, "student: 3"),
    ({"data": "folder"}, "data: 'folder'"),
    (
        {"optimizer": "adam"},
        "valid: adamw, adafactor",
    ),
    ({"divergence": "tvd"}, "mean 'tv'?"),
    ({"grid": {"divergence": ["jsd", "kl"]}}, "grid.divergence[1]: 'kl'"),
    ({"objectives": [{"divergence": "jds"}]}, "objectives[0].divergence: 'jds'"),
    ({"rescale_divergence": "maybe"}, "rescale_divergence: 'maybe'"),
    ({"rescale_divergenc": True}, "mean 'rescale_divergence'?"),
    ({"evaluations": [{"decoding": "greedi"}]}, "evaluations[0].decoding: 'greedi'"),
    ({"scale": "nan"}, "mean 'nano'?"),
    # a list where a value belongs, and the other way round
    ({"lmbda": [0, 1]}, "lmbda: [0, 1]"),
    ({"task": ["sums"]}, "task: ['sums']"),
    ({"evaluations": []}, "evaluations: []"),
    ({"evaluations": {"decoding": "beam"}}, "evaluations: {'decoding': 'beam'}"),
    ({"description": None}, "description: None"),
    (
        {"objectives": [{"type": ["kl"]}]},
        "objectives[0].type: ['kl']",
    ),
    ({"objectives": [{"type": None}]}, "objectives[0].type: None"),
    ({"objectives": [{"type": "kl"}]}, "valid: divergence, cross_e"),
    ({"objectives": [{"type": "cross_entropy", "beta": 1}]}, "unknown field 'objectives[0].beta'"),
    ({"method": "seqkt"}, "mean 'seqkd'?"),
    ({"objectives": [{"divergence": "jsd"}]}, "objectives[0].beta is missing"),
    ({"objectives": [{"beta": None}]}, "objectives[0].beta is missing"),
]


@pytest.mark.parametrize(("document", "expected"), WRONG, ids=[expected[:40] for _, expected in WRONG])
def test_an_invalid_value_is_reported_with_its_field_and_valid_choices(
    document: dict[str, Any], expected: str
) -> None:
    message = get_refusal(**document)
    assert expected in message
    assert message.startswith("stub.yaml: ")
    assert "\n" not in message


def refused(text: str | bytes, folder: Path) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_experiment(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grid: {beta: []}", "grid.beta: the list"),
        ("grid: {beta: 0.5}", "[0.5]"),
        ("grid: [beta]", "got ['beta']"),
        ("a: [1", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("[1, 2]", "got list"),
        ("", "the file is empty"),
        ("just words", "got str"),
        ("task: sums", "description is missing"),
        (b"description: \xff\xfe", "not UTF-8 text"),
        (b"description: \x00", "not valid YAML"),
    ],
)
def test_an_invalid_experiment_file_is_reported(text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert expected in refused(text, tmp_path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_experiment(path)


def test_an_empty_grid_has_no_axes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("description: d\ntask: sums\ngrid:\n")
    assert read_experiment(path).list_axes() == {}


def test_an_invalid_override_is_reported_as_such(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("description: d\n")
    with pytest.raises(ConfigError, match="beta: 'abc'"):
        read_experiment(path, {"beta": "abc"})
