"""lm-eval task files are read as data: identified by content, refused if they would run code."""

from pathlib import Path

import pytest
import yaml

from gkd_lab.config.cell import LmEvalEvaluation
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.evaluation_settings import LmEvalSettings, resolve_lm_eval_evaluations
from gkd_lab.config.lm_eval_task import (
    SHIPPED_TASKS_FOLDER,
    get_lm_eval_version,
    read_task_file,
    resolve_lm_eval_task,
)
from gkd_lab.tasks import TASKS

WRITING = ("decoder-only", "encoder-decoder")

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
doc_to_text: question
"""


def written(folder: Path, text: str = TASK, rows: str = '{"question": "?"}\n') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text(rows)
    (folder / "task.yaml").write_text(text)
    return folder / "task.yaml"


def content(path: Path) -> str | None:
    return resolve_lm_eval_task(str(path)).content


def test_a_task_file_is_identified_by_its_content_and_data_not_its_path(tmp_path: Path) -> None:
    first = content(written(tmp_path / "a"))
    assert content(written(tmp_path / "b" / "deep")) == first
    assert content(written(tmp_path / "c", rows='{"question": "!"}\n')) != first
    assert content(written(tmp_path / "d", text=f"{TASK}num_fewshot: 1\n")) != first


def test_data_is_looked_for_beside_the_task_file_then_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "tasks")
    beside = {"test": str(tmp_path / "tasks" / "rows.jsonl")}
    assert read_task_file(path)["dataset_kwargs"] == {"data_files": beside}
    (tmp_path / "tasks" / "rows.jsonl").rename(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert read_task_file(path)["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "rows.jsonl")}}


def test_an_include_is_merged_and_hashed(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "mine.yaml").write_text("include: task.yaml\ntask: mine\n")
    config = read_task_file(tmp_path / "mine.yaml")
    assert (config["task"], config["doc_to_text"]) == ("mine", "question")
    before = content(tmp_path / "mine.yaml")
    path.write_text(TASK.replace("question", "query"))
    assert content(tmp_path / "mine.yaml") != before


WRONG = {
    "task: [": "task.yaml:1: not valid YAML",
    "hello": "expected `field: value` lines, got str",
    "task: x": "`dataset_path`",
    "dataset_path: json": "`task`, the name of the task, is missing",
    "group: g\ntask: [mmlu]": "a group of tasks; name its tasks instead",
    "include: task.yaml\ntask: x": "includes itself",
    "include: other.yaml\ntask: x": "other.yaml: cannot be read: No such file",
    TASK.replace("rows", "none"): "dataset_kwargs.data_files: no file",
    TASK + "process_docs: !function utils.docs": "`!function utils.docs` would run Python code",
    TASK + "metric_list: [{metric: !function os.system}]": "`!function os.system` would run Python code",
    TASK + "class: Mine": "`class` would run Python code",
    TASK.replace("json", "pandas", 1): "`dataset_path: pandas` would run Python code",
    TASK + "x: !!python/object/apply:os.getcwd []": "could not determine a constructor",
}


@pytest.mark.parametrize(("text", "expected"), WRONG.items(), ids=range(len(WRONG)))
def test_an_unusable_task_file_is_reported_on_one_line(text: str, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        resolve_lm_eval_task(str(path))
    assert expected in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_code_of_an_included_file_is_refused_unless_trusted(tmp_path: Path) -> None:
    written(tmp_path, TASK + "process_docs: !function utils.docs\n")
    (tmp_path / "mine.yaml").write_text("include: task.yaml\ntask: mine\n")
    with pytest.raises(ConfigError, match="would run Python code"):
        resolve_lm_eval_task(str(tmp_path / "mine.yaml"))
    assert resolve_lm_eval_task(str(tmp_path / "mine.yaml"), trusted=True).name == "mine"


def test_a_local_module_cannot_shadow_the_package_functions(tmp_path: Path) -> None:
    ours = TASK + "process_results: !function gkd_lab.evaluation.lm_scores.arithmetic\n"
    assert resolve_lm_eval_task(str(written(tmp_path, ours))).name == "colours"
    shadow = tmp_path / "gkd_lab" / "evaluation" / "lm_scores.py"
    shadow.parent.mkdir(parents=True)
    shadow.write_text("def arithmetic(doc, results): ...\n")
    with pytest.raises(ConfigError, match="would run Python code"):
        resolve_lm_eval_task(str(tmp_path / "task.yaml"))


def test_each_lm_eval_task_is_an_evaluation_hashed_with_the_version() -> None:
    settings = LmEvalSettings(lm_eval=("mmlu", "bbh", "mmlu"), limit=100, num_fewshot=5)
    mmlu, bbh = resolve_lm_eval_evaluations(settings)
    assert (mmlu.name, bbh.name) == ("mmlu_5shot_first100", "bbh_5shot_first100")
    assert mmlu.lm_eval == get_lm_eval_version()
    changed = [{"lm_eval": "0.0.0"}, {"task": "bbh"}, {"limit": None}, {"num_fewshot": 0}, {"content": "1"}]
    ids = {mmlu.model_copy(update=change).fingerprint for change in changed}
    assert len(ids | {mmlu.fingerprint}) == 6
    place = LmEvalEvaluation(**{**mmlu.model_dump(), "path": "/there.yaml", "metric": "acc"})
    assert place.fingerprint == mmlu.fingerprint


def test_every_generative_task_ships_as_an_lm_eval_task_file() -> None:
    writing = {name: task for name, task in TASKS.items() if task.family in WRITING and task.generators}
    assert {path.stem for path in SHIPPED_TASKS_FOLDER.glob("*.yaml")} == set(writing)
    for name, task in writing.items():
        text = (SHIPPED_TASKS_FOLDER / f"{name}.yaml").read_text()
        config = yaml.safe_load(text.replace("!function ", ""))
        assert config["task"] == f"gkd_{name}"
        assert tuple(entry["metric"] for entry in config["metric_list"]) == task.metrics
        assert config["process_results"] == f"gkd_lab.evaluation.lm_scores.{name}"
