"""Models given by their place, and what is said where there is none."""

from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.config import ConfigError
from gkd_lab.config.errors import suggest_sibling
from gkd_lab.config.model_places import is_checkpoint, is_model_place


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("my-llama", "models/my-llama"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "my-lama-rows").mkdir()  # no model
    return tmp_path


def load(**fields: str) -> None:
    experiments.load_single_cell({"task": "arithmetic", **fields})


def test_places_are_told_from_sizes_by_their_form() -> None:
    assert [is_model_place(name) for name in ("./a", "owner/name", "~/a", "pypi:a")] == [True] * 4
    assert not is_model_place("small")


def test_the_nearest_folder_is_a_checkpoint_and_written_as_the_place_is(folder: Path) -> None:
    assert suggest_sibling("./my-lama", is_checkpoint) == "./my-llama"
    assert suggest_sibling("models/my-lama/", is_checkpoint) == "models/my-llama"
    assert suggest_sibling(str(folder / "my-lama"), is_checkpoint) == str(folder / "my-llama")
    assert suggest_sibling("./my-lama-row", is_checkpoint) == "./my-llama"
    assert suggest_sibling("./quite-another", is_checkpoint) is None
    assert suggest_sibling("nowhere/my-lama", is_checkpoint) is None


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_unknown_name_is_answered_with_sizes_folder_and_hub_names(role: str) -> None:
    message = rf"unknown {role} 'my-lama'; valid: xl, large, base, small; .*\./my-llama or a hub name"
    with pytest.raises(ConfigError, match=message):
        load(**{role: "my-lama"})
    with pytest.raises(
        ConfigError, match=r"unknown \w+\.size 'smal'; did you mean 'small'.*a folder or a hub"
    ):
        load(**{role: "{size: smal}"})


@pytest.mark.parametrize(
    ("place", "nearest"), [("./my-lama", "./my-llama"), ("models/my-lama", "models/my-llama")]
)
def test_a_missing_folder_is_answered_with_the_nearest(place: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{place}'.*did you mean the folder {nearest}\?"):
        load(teacher=place)


def test_an_unknown_teacher_of_a_loss_says_where_models_get_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown teacher './my-llama'; .*under `teachers`"):
        load(objectives="[{beta: 0, teacher: ./my-llama}]")
