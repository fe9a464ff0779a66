"""Columns with other names than the task's."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from gkd_lab.config.artifact_specs import ColumnNames, DataSpec
from gkd_lab.tasks import TASKS, RowList, get_task, load_rows, resolve_columns
from gkd_lab.tasks.columns import build_column_reader


def load(folder: Path, task: str, row: dict[str, Any], **columns: str) -> RowList:
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    resolved = resolve_columns(get_task(task), "folder", ColumnNames(**columns))
    return load_rows(get_task(task), "folder", path=folder, split="test", columns=resolved)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_columns_under_other_names(name: str) -> None:
    task = TASKS[name]
    raw = {"x": 1, "y": 2}
    renamed = build_column_reader(task, ColumnNames(prompt="x", target="y"))(raw)
    assert renamed == {task.columns["prompt"]: 1, task.columns["target"]: 2}


def test_rows_are_read_by_the_columns_stated(tmp_path: Path) -> None:
    row = {"q": "2 + 3?", "steps": "5 #### 5", "question": "another", "lehrer": "a"}
    (loaded,) = load(tmp_path, "arithmetic", row, prompt="q", target="steps", teacher="lehrer")
    assert (loaded.prompt, loaded.target, loaded.teacher) == ("2 + 3?", "5 #### 5", "a")


def test_a_column_that_is_left_out_has_the_tasks_name(tmp_path: Path) -> None:
    (loaded,) = load(tmp_path, "arithmetic", {"q": "2 + 3?", "answer": "5"}, prompt="q")
    assert (loaded.prompt, loaded.target) == ("2 + 3?", "#### 5")


def test_a_dot_names_a_field_within_a_column(tmp_path: Path) -> None:
    row = {"translation": {"de": "Haus", "fr": "maison"}}
    (loaded,) = load(tmp_path, "translation", row, prompt="translation.fr", target="translation.de")
    assert (loaded.prompt, loaded.target) == ("maison", "Haus")


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"test\.jsonl:1: data\.columns\.prompt: no column 'question'.*'question_text'"
    ):
        load(tmp_path, "text", {"question_text": "a", "target": "b"}, prompt="question")


def test_an_invalid_value_is_named_with_its_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"field 'answer' must be .*answer is the column 'solution'"):
        load(tmp_path, "arithmetic", {"question": "2 + 3?", "solution": "five"}, target="solution")


def test_columns_of_made_rows_and_columns_that_a_task_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.columns: made rows of arithmetic"):
        resolve_columns(get_task("arithmetic"), "made", ColumnNames(prompt="q"))
    with pytest.raises(ValueError, match=r"data\.columns\.references: .*valid: prompt, target, teacher"):
        resolve_columns(get_task("arithmetic"), "folder", ColumnNames(references="r"))


def test_the_tasks_own_names_are_no_columns_and_leave_the_fingerprint_alone() -> None:
    task = get_task("arithmetic")
    assert resolve_columns(task, "folder", ColumnNames(prompt="question", target="answer")) is None
    assert resolve_columns(task, "folder", ColumnNames()) is None
    data = DataSpec(kind="folder", revision="1")
    renamed = DataSpec(kind="folder", revision="1", columns=ColumnNames(prompt="q"))
    assert "columns" not in data.canonical_json
    assert renamed.fingerprint != data.fingerprint


def load_hub_rows(task: str, columns: ColumnNames | None) -> RowList:
    return load_rows(get_task(task), "hub", name="owner/name", revision="1", split="test", columns=columns)


def test_blank_texts_drop_hub_rows_only_in_the_columns_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"q": ["a", " ", "c"], "target": ["A", "B", "C"], "notes": ["", "n", "n"]}
    dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
    loaded = load_hub_rows("text", ColumnNames(prompt="q"))
    assert [row.prompt for row in loaded] == ["a", "c"]
    assert loaded.dropped_counts == {"an empty field": 1}
