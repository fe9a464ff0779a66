"""docs/data.md is true: each task reads its line, the words of splits are read, the experiment resolves."""

import json
import re
from pathlib import Path

import pytest
import yaml

from gkd_lab import experiments
from gkd_lab.metrics import METRICS
from gkd_lab.tasks import TASKS
from gkd_lab.tasks.data_folder import DataFolder

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
LINES = dict(re.findall(r"^\| `(\w+)` \|.*\| `(\{.*\})` \|$", TEXT, re.MULTILINE))


def test_every_task_has_a_line_that_it_reads() -> None:
    assert LINES.keys() == TASKS.keys()
    for name, line in LINES.items():
        row = TASKS[name].parse_row(json.loads(line))
        assert row.prompt
        assert row.target


@pytest.mark.parametrize("name", TASKS)
def test_the_columns_of_the_page_are_the_tasks(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \| (.*)$", TEXT, re.MULTILINE)
    cells = row.split(" | ")
    assert cells[0] == f"`{TASKS[name].columns['prompt']}`"
    assert cells[1].startswith(f"`{TASKS[name].columns['target']}`")


def test_the_names_of_files_are_read_as_the_split_stated(tmp_path: Path) -> None:
    table = re.findall(r"^\| (train|validation|test) \| (.*) \|$", TEXT, re.MULTILINE)
    assert len(table) == 3
    for split, names in table:
        for name in re.findall(r"`(\w+)`", names):
            folder = tmp_path / name
            folder.mkdir()
            (folder / f"{name}.jsonl").write_text("{}\n")
            assert list(DataFolder(folder).files) == [split]


def test_the_experiment_of_the_page_resolves_and_its_metrics_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (document,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    Path("questions").mkdir()
    for split in ("train", "test"):
        line = json.dumps({"question_text": "a", "solution": "b"}) + "\n"
        (Path("questions") / f"{split}.jsonl").write_text(line * 60)
    Path("mine.yaml").write_text(document)
    grid = experiments.load("mine.yaml")
    assert len(grid.cells) == 9
    assert grid.cells[0].training.data.columns is not None
    assert set(yaml.safe_load(document)["metrics"]) <= METRICS.keys()
    (listed,) = re.findall(r"Metrics of texts are (.*?);", TEXT, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) <= METRICS.keys()
