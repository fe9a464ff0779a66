"""The task `text`: any pairs, with columns, metrics and kind of models chosen by the experiment."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd_lab import experiments
from gkd_lab.config import ConfigError, Evaluation, Grid
from gkd_lab.config.cell import Selection
from gkd_lab.tasks.text import parse_row

ROWS = [{"question_text": f"question {n}", "solution": f"answer {n}"} for n in range(60)]
FIELDS = {
    "task": "text",
    "data.source": "questions",
    "data.columns": "{prompt: question_text, target: solution}",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "questions"
    path.mkdir()
    for split in ("train", "test"):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def load_grid(**fields: str) -> Grid:
    return experiments.load_single_cell({**FIELDS, **fields})


def get_evaluation(grid: Grid) -> Evaluation:
    (evaluation,) = grid.cells[0].evaluations
    assert isinstance(evaluation, Evaluation)
    return evaluation


def test_a_row_has_references_where_the_data_has_some() -> None:
    raw: dict[str, Any] = {"prompt": " a ", "target": "b"}
    assert (parse_row(raw).prompt, parse_row(raw).references) == ("a", ("b",))
    assert parse_row({**raw, "references": ["b", "c"]}).references == ("b", "c")
    with pytest.raises(ValueError, match="'references' must be a list of texts"):
        parse_row({**raw, "references": "b"})


def test_the_experiment_chooses_columns_metrics_and_family() -> None:
    plain = load_grid()
    assert get_evaluation(plain).metrics == ("rougeL", "exact_match")
    assert plain.cells[0].training.start.family == "decoder-only"
    training = load_grid(family="encoder-decoder", metrics="[bleu, chrf]", eval_every="10").cells[0].training
    assert (training.start.family, training.teacher.family) == ("encoder-decoder", "encoder-decoder")
    assert training.selection == Selection(every=10, rows=None, metric="bleu")
    assert training.data.columns is not None
    assert training.data.columns.model_dump(exclude_none=True) == {
        "prompt": "question_text",
        "target": "solution",
    }


def test_metrics_hold_for_evaluations_that_name_none() -> None:
    evaluations = "[{decoding: greedy}]"
    stated = load_grid(metrics="[bleu]", evaluations=evaluations)
    assert get_evaluation(stated).metrics == ("bleu",)
    evaluations = "[{decoding: greedy, metrics: [chrf]}]"
    assert get_evaluation(load_grid(metrics="[bleu]", evaluations=evaluations)).metrics == ("chrf",)


def test_other_tasks_take_metrics_and_a_family_too() -> None:
    cell = experiments.load_single_cell(
        {"task": "arithmetic", "family": "encoder-decoder", "metrics": "[exact_match]"}
    ).cells[0]
    default = experiments.load_single_cell({"task": "arithmetic"}).cells[0]
    own = experiments.load_single_cell({"task": "arithmetic", "family": "decoder-only"}).cells[0]
    assert cell.training.start.family == "encoder-decoder"
    assert own.full_fingerprint == default.full_fingerprint != cell.full_fingerprint
    with pytest.raises(ConfigError, match="family: models of classification are for"):
        experiments.load_single_cell({"task": "classification", "family": "decoder-only"})


def test_a_first_row_that_is_none_is_refused_before_anything_runs(folder: Path) -> None:
    (folder / "test.jsonl").write_text('{"question_text": "a", "answer": "b"}\n')
    with pytest.raises(ConfigError, match=r"test\.jsonl:1: data\.columns\.target: no column 'solution'"):
        load_grid()


def test_without_data_the_message_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r"data\.source is missing: text has no rows of its own"):
        experiments.load_single_cell({"task": "text"})
