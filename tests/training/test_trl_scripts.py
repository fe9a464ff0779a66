"""Who comes from TRL changes one import: scripts, signatures, defaults."""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl.experimental.gkd import GKDConfig as TrlConfig
from trl.experimental.gkd import GKDTrainer as TrlTrainer

from gkd_lab import GKDConfig, GKDTrainer

from .trl_scripts import FROM_GKD_LAB, FROM_TRL, TODAYS, YESTERDAYS, run, save_models


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which a script runs, loads its models and saves its results."""
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_trained(trainer: Any, folder: Path) -> None:
    """A training loss was logged, and the last checkpoint holds weights that differ from the first ones."""
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    start = load_file(folder.parent / "student" / "model.safetensors")
    end = load_file(folder / f"checkpoint-{trainer.state.max_steps}" / "model.safetensors")
    assert start.keys() == end.keys()
    assert any(not torch.equal(weights, end[name]) for name, weights in start.items())


@pytest.mark.parametrize("the_import", [FROM_TRL, FROM_GKD_LAB])
def test_a_script_for_todays_trl_runs_with_either_import(folder: Path, the_import: str) -> None:
    trainer, _ = run(TODAYS, the_import)
    assert type(trainer) is (GKDTrainer if the_import == FROM_GKD_LAB else TrlTrainer)
    assert_trained(trainer, folder / "distilled")


def test_a_script_for_todays_trl_is_not_told_of_any_former_name() -> None:
    _, caught = run(TODAYS, FROM_GKD_LAB)
    assert not [str(w.message) for w in caught if "processing_class" in str(w.message)]
    assert not [str(w.message) for w in caught if "max_length" in str(w.message)]


def test_a_script_for_older_trl_runs_and_is_told_the_new_names(folder: Path) -> None:
    trainer, caught = run(YESTERDAYS, FROM_GKD_LAB)
    assert_trained(trainer, folder / "distilled-as-before")
    assert trainer.args.max_length == 48
    told = [str(w.message) for w in caught if issubclass(w.category, FutureWarning)]
    for former, name in (("tokenizer", "processing_class"), ("max_seq_length", "max_length")):
        assert [text for text in told if former in text and name in text], name


def test_a_script_for_older_trl_no_longer_runs_with_todays() -> None:
    with pytest.raises(TypeError, match="max_seq_length"):
        run(YESTERDAYS, FROM_TRL)


def test_the_constructor_takes_the_arguments_of_trl_in_their_order() -> None:
    theirs = inspect.signature(TrlTrainer).parameters
    ours = inspect.signature(GKDTrainer).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind is parameter.kind, name
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("name", ["generalized_jsd_loss", "generate_on_policy_outputs"])
def test_the_static_methods_take_the_arguments_of_trl(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(trainer, name)) for trainer in (TrlTrainer, GKDTrainer))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


def test_every_field_of_trl_has_the_default_of_trl(folder: Path) -> None:
    theirs = TrlConfig(output_dir=str(folder), use_cpu=True)
    ours = GKDConfig(output_dir=str(folder), use_cpu=True)
    # Where the logs go contains the time of day.
    fields = [field.name for field in dataclasses.fields(theirs) if field.name != "logging_dir"]
    differing = {n: (getattr(theirs, n), getattr(ours, n)) for n in fields}
    assert {n: pair for n, pair in differing.items() if str(pair[0]) != str(pair[1])} == {}
