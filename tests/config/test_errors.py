"""Messages name the field, the value, the reason and the valid choices."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import ConfigError, read_experiment

from .stub import get_refusal

WRONG: list[tuple[dict[str, Any], str]] = [
    # unknown fields, at every depth, with the nearest name of that depth
    ({"lmbd": 0}, "unknown field 'lmbd'; did you mean 'lmbda'? valid: lmbda"),
    ({"grid": {"lmbd": [0]}}, "unknown field 'grid.lmbd'; did you mean 'lmbda'? valid: lmbda"),
    ({"grid": {"data.trian": [0]}}, "unknown field 'grid.data.trian'; did you mean 'data.train'?"),
    ({"per_task": {"sums": {"stps": 3}}}, "unknown field 'per_task.sums.stps'; did you mean 'steps'?"),
    (
        {"student": {"wdth": 3}},
        "unknown field 'student.wdth'; did you mean 'width'? valid: width",
    ),
    ({"grid": {"student": [{"wdth": 3}]}}, "unknown field 'grid.student[0].wdth'; did you mean 'width'?"),
    ({"student": {"sft": {"stps": 3}}}, "unknown field 'student.sft.stps'; did you mean 'steps'?"),
    ({"data": {"sourc": "x"}}, "unknown field 'data.sourc'; did you mean 'source'? valid: source, config"),
    ({"evaluations": [{"decodin": "x"}]}, "'evaluations[0].decodin'; did you mean 'decoding'?"),
    ({"paper": {"figure": []}}, "unknown field 'paper.figure'; did you mean 'figures'?"),
    # values out of range, of the wrong kind, or not among the choices
    ({"lmbda": 1.5}, "lmbda: 1.5 is not valid: must be from 0 to 1"),
    ({"lmbda": -0.1}, "lmbda: -0.1 is not valid: must be from 0 to 1"),
    ({"grid": {"lmbda": [0, 1.5]}}, "grid.lmbda[1]: 1.5 is not valid: must be from 0 to 1"),
    ({"beta": "abc"}, "beta: 'abc' is not valid: must be a number from 0 to 1"),
    ({"temperature": 0}, "temperature: 0 is not valid: must be more than 0"),
    ({"grid": {"temperature": [float("inf")]}}, "grid.temperature[0]: inf is not valid: must be a finite"),
    ({"grid": {"lmbda": [float("nan")]}}, "grid.lmbda[0]: nan is not valid: must be"),
    ({"warmup_steps": -1}, "warmup_steps: -1 is not valid: must be at least 0"),
    ({"steps": 2.5}, "steps: 2.5 is not valid: must be a whole number more than 0"),
    ({"grid": {"lmbda": [None]}}, "grid.lmbda[0]: None is not valid: must be a number from 0 to 1"),
    ({"student": 3}, "student: 3 is not valid: must be text or `field: value` lines of layers, width"),
    ({"data": "folder"}, "data: 'folder' is not valid: must be `field: value` lines of source, config"),
    (
        {"optimizer": "adam"},
        "optimizer: 'adam' is not valid: did you mean 'adamw'? valid: adamw, adafactor",
    ),
    ({"divergence": "tvd"}, "divergence: 'tvd' is not valid: did you mean 'tv'? valid: jsd, tv"),
    ({"grid": {"divergence": ["jsd", "kl"]}}, "grid.divergence[1]: 'kl' is not valid: valid: jsd, tv"),
    ({"objectives": [{"divergence": "jds"}]}, "objectives[0].divergence: 'jds' is not valid: did you mean"),
    ({"rescale_divergence": "maybe"}, "rescale_divergence: 'maybe' is not valid: must be true or false"),
    ({"rescale_divergenc": True}, "'rescale_divergenc'; did you mean 'rescale_divergence'?"),
    ({"evaluations": [{"decoding": "greedi"}]}, "evaluations[0].decoding: 'greedi' is not valid: did you"),
    ({"scale": "nan"}, "scale: 'nan' is not valid: did you mean 'nano'? valid: nano, smol, paper"),
    # a list where a value belongs, and the other way round
    ({"lmbda": [0, 1]}, "lmbda: [0, 1] is not valid: must be a number from 0 to 1; several values make"),
    ({"task": ["sums"]}, "task: ['sums'] is not valid: must be text; several values make an axis"),
    ({"evaluations": []}, "evaluations: [] is not valid: the list is empty"),
    ({"evaluations": {"decoding": "beam"}}, "is not valid: must be a list of values"),
    ({"description": None}, "description: None is not valid: must be text"),
    (
        {"objectives": [{"type": ["kl"]}]},
        "objectives[0].type: ['kl'] is not valid: valid: divergence, cross_e",
    ),
    ({"objectives": [{"type": None}]}, "objectives[0].type: None is not valid: valid: divergence, cross_e"),
    ({"objectives": [{"type": "kl"}]}, "objectives[0].type: 'kl' is not valid: valid: divergence, cross_e"),
    ({"objectives": [{"type": "cross_entropy", "beta": 1}]}, "unknown field 'objectives[0].beta'"),
    ({"method": "seqkt"}, "method: 'seqkt' is not valid: did you mean 'seqkd'? valid: seqkd, sft,"),
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
        ("grid: {beta: []}", "grid.beta: the list is empty, so there is no cell to run"),
        ("grid: {beta: 0.5}", "grid.beta: must be a list of values, got 0.5; did you mean [0.5]?"),
        ("grid: [beta]", "grid: expected `axis: [values]` lines, got ['beta']"),
        ("a: [1", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("[1, 2]", "expected `field: value` lines, got list"),
        ("", "expected `field: value` lines, got NoneType"),
        ("just words", "expected `field: value` lines, got str"),
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
