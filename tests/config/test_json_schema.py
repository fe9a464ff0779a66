"""The committed JSON Schema of experiment files matches the code that reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gkd_lab.config.experiment import AXIS_NAMES
from gkd_lab.config.fingerprint import FORMAT_VERSION
from gkd_lab.config.json_schema import build_json_schema, format_json_schema
from gkd_lab.config.settings import Settings

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SCHEMA = EXPERIMENTS / "experiment.schema.json"


def test_the_committed_schema_is_current() -> None:
    assert SCHEMA.read_text() == format_json_schema(), "run `make schema`"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_names_the_schema_on_its_first_line(path: Path) -> None:
    assert path.open().readline() == f"# yaml-language-server: $schema={SCHEMA.name}\n"


def test_the_id_of_the_schema_holds_the_format_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_json_schema()["$id"] == f"urn:gkd-lab:experiment:{FORMAT_VERSION}"
    monkeypatch.setattr("gkd_lab.config.json_schema.FORMAT_VERSION", FORMAT_VERSION + 1)
    assert build_json_schema()["$id"] == f"urn:gkd-lab:experiment:{FORMAT_VERSION + 1}"
    page = (EXPERIMENTS.parent / "docs" / "usage.md").read_text()
    assert f"`urn:gkd-lab:experiment:{FORMAT_VERSION}`" in page


def test_the_schema_describes_every_axis_and_setting() -> None:
    schema = build_json_schema()
    axes = schema["$defs"]["GridAxes"]["properties"]
    assert list(axes) == list(AXIS_NAMES)
    assert {"task", "lmbda", "data.source", "tokenizer.vocab_size"} <= set(axes)
    assert all(axis["type"] == "array" and axis["minItems"] == 1 for axis in axes.values())
    bare = [name for name in Settings.model_fields if "description" not in schema["properties"][name]]
    assert bare == []


def errors(document: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(build_json_schema())
    return [error.message for error in validator.iter_errors(document)]


def test_the_schema_is_a_valid_json_schema() -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    faults = validator(validator.META_SCHEMA).iter_errors(json.loads(format_json_schema()))
    assert [error.message for error in faults] == []


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_valid_under_the_schema(path: Path) -> None:
    assert errors(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"lmbd": 0},
        {"lmbda": 1.5},
        {"grid": {"lmbda": 0.5}},
        {"grid": {"lmbda": []}},
        {"grid": {"lmbda": [1.5]}},
        {"grid": {"data.sourc": ["made"]}},
        {"student": {"wdth": 3}},
        {"optimizer": "adam"},
        {"evaluations": [{"decoding": "greedi"}]},
    ],
    ids=str,
)
def test_schema_and_reader_reject_the_same_files(wrong: dict[str, Any]) -> None:
    assert errors({"description": "d"}) == []
    assert len(errors({"description": "d", **wrong})) == 1
