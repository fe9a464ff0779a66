"""Runs of classifier grids: packing, resuming, scores and comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gkd_lab.config import Grid
from gkd_lab.report.comparison import compare_records
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store
from gkd_lab.store.rescore import rescore_evaluation

from .tiny_experiments import contents, interrupted_at, options, table_of, tiny_grid

SMALL: dict[str, Any] = {
    "data": {"train": 40, "validation": 8, "test": 12},
    "max_input_tokens": 56,
    "max_output_tokens": 1,
    "evaluations": [{"decoding": "greedy"}],
    "student": {"layers": 1, "width": 8, "heads": 2},
}
HARD = [{"type": "cross_entropy"}]
SOFT = [{"beta": 0, "teacher_temperature": 2, "student_temperature": 2, "square_temperature": True}]


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


GRIDS: dict[str, Any] = {
    "classification": {"objectives": [HARD, SOFT, [*SOFT, *HARD]]},
    "tagging": {"objectives": [HARD, SOFT, [*SOFT, *HARD]]},
    "scoring": {
        "objectives": [[{"type": "squared_error"}], [{"type": "squared_error", "against": "labels"}]],
        "seed": [0, 1],
    },
}


def build_grid(folder: Path, task: str) -> Grid:
    return tiny_grid(folder, task, task, grid=GRIDS[task], **SMALL)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Path]:
    folder = tmp_path_factory.mktemp("classification")
    grid = build_grid(folder, "classification")
    assert run_grid(grid, options(folder / "outputs")).failures == []
    return grid, folder / "outputs"


@pytest.mark.parametrize("task", ["tagging", "scoring"])
def test_classifiers_are_trained_as_one_pack_and_scored(tmp_path: Path, task: str) -> None:
    grid, outputs = build_grid(tmp_path, task), tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    check_scores(grid, outputs)


def test_classification_grid_is_scored(finished_run: tuple[Grid, Path]) -> None:
    check_scores(*finished_run)


def check_scores(grid: Grid, outputs: Path) -> None:
    """Check that each table row has all scores with intervals, in one pack, and that rescoring keeps them."""
    rows = table_of(grid, outputs)
    assert [row["status"] for row in rows] == ["done"] * len(rows)
    metrics = grid.cells[0].evaluations[0].metrics
    assert all(isinstance(row[f"{metric}.low"], float) for row in rows for metric in metrics)
    record = Store(outputs).get_record(grid.cells[0])
    facts = json.loads((record.folder / "provenance.json").read_text())
    assert len(facts["pack"]) == len(grid.cells)
    evaluation_record = record.get_evaluation(grid.cells[0].evaluations[0])
    scores_before = evaluation_record.read_scores()
    rescore_evaluation(evaluation_record, metrics)
    assert evaluation_record.read_scores() == scores_before


def test_predictions_have_the_probability_of_every_label(finished_run: tuple[Grid, Path]) -> None:
    grid, outputs = finished_run
    record = Store(outputs).get_record(grid.cells[0])
    evaluation_record = record.get_evaluation(grid.cells[0].evaluations[0])
    lines = [
        json.loads(line) for line in (evaluation_record.folder / "predictions.jsonl").read_text().splitlines()
    ]
    model = AutoModelForSequenceClassification.from_pretrained(record.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(record.checkpoint)
    for line in lines[:4]:
        with torch.no_grad():
            probabilities = (
                model(**tokenizer(line["prompt"], return_tensors="pt")).logits.softmax(-1)[0].tolist()
            )
        assert list(line["probabilities"]) == ["negative", "mixed", "positive"]
        assert list(line["probabilities"].values()) == pytest.approx(probabilities, abs=2e-6)
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)


def test_interrupted_run_resumes_to_equal_bytes(
    finished_run: tuple[Grid, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, outputs = build_grid(tmp_path, "classification"), tmp_path / "outputs"
    with interrupted_at(3, monkeypatch):
        run_grid(grid, options(outputs))
    assert run_grid(grid, options(outputs)).failures == []
    assert Store(outputs).get_record(grid.cells[0]).read_provenance()["resumed_at_step"] == 2
    assert contents(outputs) == contents(finished_run[1])


def test_two_classifiers_are_compared_by_each_metric(finished_run: tuple[Grid, Path]) -> None:
    grid, outputs = finished_run
    first_record, second_record = (Store(outputs).get_record(cell) for cell in grid.cells[:2])
    evaluation = grid.cells[0].evaluations[0]
    for metric in ("label_accuracy", "f1_macro", "matthews"):
        comparison = compare_records(first_record, second_record, metric=metric)
        values = [
            record.get_evaluation(evaluation).read_scores()[metric]["value"]
            for record in (first_record, second_record)
        ]
        assert [comparison.a.score, comparison.b.score] == pytest.approx(values)
        assert comparison.paired and comparison.n == 12
