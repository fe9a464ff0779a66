"""docs/family.md does what it says: its experiments resolve, its Python runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from gkd_lab import GKDConfig, GKDTrainer, Teacher, experiments

from .models.tiny import tiny_examples, tiny_model, tiny_tokenizer
from .training.driving import arguments

PAGE = Path(__file__).parents[1] / "docs" / "family.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.splitlines()[0][13:40])
def test_each_experiment_of_the_page_resolves(block: str, tmp_path: Path) -> None:
    assert len(block.splitlines()) <= 10
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    assert experiments.load(str(path), outputs=tmp_path / "outputs").cells


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0][:30])
def test_each_script_of_the_page_trains(block: str, tmp_path: Path) -> None:
    assert len(block.splitlines()) <= 10
    shared = vars(arguments(tmp_path))

    def create_config(**changes: Any) -> GKDConfig:
        names = ("use_cpu", "bf16", "report_to", "disable_tqdm", "max_new_tokens", "logging_steps")
        return GKDConfig(**{name: shared[name] for name in names}, **changes)

    namespace = {
        "GKDConfig": create_config,
        "GKDTrainer": GKDTrainer,
        "Teacher": Teacher,
        "folder": str(tmp_path),
        "student": tiny_model("decoder-only", 7),
        "teacher": tiny_model("decoder-only", 3, width=32),
        "second_teacher": tiny_model("decoder-only", 5),
        "tokenizer": tiny_tokenizer(),
        "rows": tiny_examples(),
    }
    exec(block, namespace)


def test_every_member_has_an_experiment_of_its_own() -> None:
    """Each section's nano result is an experiment with a notebook."""
    named = re.findall(r"\(\.\./analysis/(\w+)\.ipynb\)", PAGE.read_text())
    assert len(named) >= 8
    assert set(named) <= set(experiments.list_experiment_files())
