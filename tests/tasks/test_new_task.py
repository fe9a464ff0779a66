"""The page on new tasks is true: its file is a task, its test passes, and a grid takes it."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from gkd_lab.config import RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.experiment import parse_experiment
from gkd_lab.tasks import TASKS, load_rows

from ..page_code import load_page_module

PAGE = Path(__file__).parents[2] / "docs" / "new_task.md"
NAME = "gkd_lab.tasks.reversal"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    task, test = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    try:
        yield load_page_module(NAME, task, tmp_path), load_page_module("test_reversal", test, tmp_path)
    finally:
        for name in (NAME, "test_reversal"):
            sys.modules.pop(name, None)


def test_the_code_of_the_page_works(page: tuple[ModuleType, ModuleType]) -> None:
    task, test = page
    test.test_the_words_are_reversed()
    (row,) = load_rows(task.TASK, "made", split="test", count=1)
    assert row.target.split() == row.prompt.split()[::-1]
    experiment = parse_experiment({"description": "d", "task": "reversal"}, "page")
    seen = RevisionLookup(
        resolve_data=lambda task, settings: DataSpec(
            kind="made", name="made", revision="1", train=settings.train
        ),
        resolve_model=lambda place: (place, None, "1"),
    )
    (cell,) = expand_grid("page", experiment, {**TASKS, "reversal": task.TASK}, seen).cells
    assert (cell.training.data.train, cell.evaluations[0].metrics) == (2000, ("exact_match",))
