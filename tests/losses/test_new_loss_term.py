"""The page on new loss terms is true: its loss passes its test and trains from YAML and from Python."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.config import ConfigError
from gkd_lab.config.loss_registry import LOSSES, load_loss_class
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store

from ..models.tiny import tiny_examples, tiny_model, tiny_tokenizer
from ..page_code import load_page_module
from ..runner.tiny_experiments import options, tiny_grid
from ..training.driving import arguments

PAGE = Path(__file__).parents[2] / "docs" / "new_loss_term.md"
LOSS, LINE, TEST, SCRIPT = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
(EXPERIMENT,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
NAME = "gkd_lab.losses.label_smoothing"
GREEDY = [{"decoding": "greedy"}]


@pytest.fixture
def test_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's test; its loss is registered as its line says."""
    load_page_module(NAME, LOSS, tmp_path)
    for name, path in eval(f"{{{LINE}}}").items():
        monkeypatch.setitem(LOSSES, name, path)
    try:
        yield load_page_module("test_label_smoothing", TEST, tmp_path)
    finally:
        for name in (NAME, "test_label_smoothing"):
            sys.modules.pop(name, None)


def test_the_loss_passes_the_test_of_the_page(test_module: ModuleType) -> None:
    test_module.test_value_and_gradient()


def test_an_experiment_trains_with_the_term(test_module: ModuleType, tmp_path: Path) -> None:
    document = yaml.safe_load(EXPERIMENT)
    stated = {name: document[name] for name in ("lmbda", "objectives")}
    grid = tiny_grid(tmp_path, document["task"], grid={"seed": [0]}, evaluations=GREEDY, **stated)
    outputs = tmp_path / "outputs"
    for _ in range(2):  # the second run reads the records of the first
        assert run_grid(grid, options(outputs)).failures == []
    (cell,) = grid.cells
    history = Store(outputs).get_record(cell).read_history()
    assert all(row["loss/label_smoothing"] > 0 for row in history)
    assert '"epsilon":0.2' in cell.training.canonical_json


def test_a_script_trains_with_the_term(test_module: ModuleType, tmp_path: Path) -> None:
    shared, student = vars(arguments(tmp_path)), tiny_model("decoder-only", 7)

    def create_config(**changes: Any) -> GKDConfig:
        names = ("use_cpu", "bf16", "report_to", "disable_tqdm", "max_new_tokens", "logging_steps")
        return GKDConfig(**{name: shared[name] for name in names}, **changes)

    exec(
        SCRIPT,
        {
            "GKDConfig": create_config,
            "GKDTrainer": GKDTrainer,
            "folder": str(tmp_path),
            "student": student,
            "teacher": tiny_model("decoder-only", 3, width=32),
            "tokenizer": tiny_tokenizer(),
            "rows": tiny_examples(),
        },
    )
    pairs = zip(student.parameters(), tiny_model("decoder-only", 7).parameters(), strict=True)
    assert not any(torch.equal(trained, initial) for trained, initial in pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"epsilon": 1}, "epsilon: 1"), ({"share": 0.1}, "unknown field .*share")],
)
def test_experiment_and_trainer_refuse_the_same_setting(
    fields: dict[str, Any], message: str, test_module: ModuleType, tmp_path: Path
) -> None:
    objectives = [{"type": "label_smoothing", **fields}]
    with pytest.raises(ConfigError, match=message):
        tiny_grid(tmp_path, "arithmetic", lmbda=0, objectives=objectives)
    trainer = (tiny_model("decoder-only", 7), tiny_model("decoder-only", 3))
    with pytest.raises(ConfigError, match=message):
        GKDTrainer(
            *trainer,
            arguments(tmp_path, lmbda=0.0, objectives=objectives),
            train_dataset=tiny_examples(),
            processing_class=tiny_tokenizer(),
        )


def test_an_unregistered_type_is_refused_with_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'label_smoothing'.*cross_entropy"):
        tiny_grid(tmp_path, "arithmetic", lmbda=0, objectives=[{"type": "label_smoothing"}])


@pytest.mark.parametrize("term_type", LOSSES)
def test_every_registered_loss_loads_and_builds_terms(term_type: str) -> None:
    assert callable(load_loss_class(term_type).build)


def test_a_wrong_type_is_refused_without_torch() -> None:
    code = """
import sys
from gkd_lab.config import ConfigError
from gkd_lab.config.experiment import parse_experiment
terms = [{"type": "cross_entropi"}]
try:
    parse_experiment({"description": "d", "task": "arithmetic", "objectives": terms}, "file")
except ConfigError as error:
    assert "did you mean 'cross_entropy'" in str(error)
else:
    raise AssertionError("accepted")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
