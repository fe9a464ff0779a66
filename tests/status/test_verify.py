"""Verification finds each kind of damage to a record and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import Grid
from gkd_lab.config.cell import list_references
from gkd_lab.status.verify import VerificationResult, list_candidate_records, verify_records
from gkd_lab.store import EvaluationRecord, Record, Store
from gkd_lab.store.provenance import collect_provenance, describe_sources

from ..tables.prediction_records import write_predictions
from ..tables.synthetic_store import build_grid

PREDICTIONS = [
    ("1 + 1 =", "#### 2", "#### 2"),
    ("1 + 2 =", "#### 4", "#### 3"),
    ("2 + 2 =", "#### 4", "#### 4"),
]


@pytest.fixture(scope="module")
def grid() -> Grid:
    return build_grid(grid={"lmbda": [0, 1], "beta": [0.5]})


@pytest.fixture(scope="module")
def finished_outputs(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write both reference models and both cells as a run finishes them."""
    store = Store(tmp_path_factory.mktemp("finished_outputs"))
    for role, model, cells in list_references(grid.cells):
        record = store.get_artifact(grid.scale, role, model)
        record.write_spec(model, role=role)
        write_checkpoint(record, role)
        record.write_provenance(collect_provenance())
        record.finish(parameters=1)
        write_predictions(record, cells[0].evaluations[0], PREDICTIONS)  # type: ignore[arg-type]
    for cell in grid.cells:
        record = store.get_record(cell)
        record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
        record.rewind_history(0)
        record.log_row({"step": 10, "loss": 0.5})
        write_checkpoint(record, cell.fingerprint)
        record.write_provenance(collect_provenance(**describe_sources(cell.training, cell.scale, store)))
        record.finish(steps=10)
        write_predictions(record, cell.evaluations[0], PREDICTIONS)  # type: ignore[arg-type]
    return store.root


@pytest.fixture
def store(finished_outputs: Path, tmp_path: Path) -> Store:
    """Copy the finished outputs, to be damaged."""
    shutil.copytree(finished_outputs, tmp_path / "outputs")
    return Store(tmp_path / "outputs")


def write_checkpoint(record: Record, content: str) -> None:
    record.checkpoint.mkdir()
    (record.checkpoint / "model.safetensors").write_text(content)


def verify_all(grid: Grid, store: Store) -> VerificationResult:
    return verify_records(grid, store, list_candidate_records(grid, store))


def test_a_finished_experiment_has_no_mismatch(grid: Grid, store: Store) -> None:
    result = verify_all(grid, store)
    assert (result.mismatches, result.notes, result.missing) == ([], [], 0)
    assert (result.records, result.evaluations) == (4, 4)
    assert result.files == 2 * 3 + 2 * 4


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


Damage = Callable[[Record, EvaluationRecord], object]
DAMAGES: dict[str, Damage] = {
    "spec.json was": lambda record, _: replace_text(
        record.folder / "spec.json", '"steps": 10', '"steps": 20'
    ),
    "spec.json has format 0": lambda record, _: change_json(record.folder / "spec.json", format=0),
    "spec.json is no Training: steps": lambda record, _: replace_text(
        record.folder / "spec.json", '"steps": 10', '"steps": -1'
    ),
    "spec.json is missing or damaged": lambda record, _: (record.folder / "spec.json").write_text("{"),
    "status.json is damaged": lambda record, _: record.status_file.write_text('{"state": "do'),
    "checkpoint/model.safetensors has changed": lambda record, _: (
        record.checkpoint / "model.safetensors"
    ).write_text("other"),
    "metrics.jsonl is missing": lambda record, _: record.metrics_file.unlink(),
    "provenance.json is missing or damaged": lambda record, _: (record.folder / "provenance.json").unlink(),
    "names data 0, not its own": lambda record, _: change_json(
        record.folder / "provenance.json", data={"revision": "0"}
    ),
    "predictions.jsonl is cut short: 2 of 3": lambda _, evaluation: (
        evaluation.folder / "predictions.jsonl"
    ).write_text(
        "".join((evaluation.folder / "predictions.jsonl").read_text().splitlines(keepends=True)[:2])
    ),
    "predictions.jsonl:1: expected a JSON object": lambda _, evaluation: replace_text(
        evaluation.folder / "predictions.jsonl", "{", ""
    ),
    "predictions.jsonl is missing": lambda _, evaluation: (evaluation.folder / "predictions.jsonl").unlink(),
    "accuracy is 66.6": lambda _, evaluation: replace_text(
        evaluation.folder / "predictions.jsonl", "#### 2", "#### 9"
    ),
    "accuracy is 70.0 in scores.json, 66.6": lambda _, evaluation: change_json(
        evaluation.folder / "scores.json", accuracy={**evaluation.read_scores()["accuracy"], "value": 70.0}
    ),
    "scores.json has no accuracy": lambda _, evaluation: (evaluation.folder / "scores.json").write_text("{}"),
    "accuracy of 1 predictions": lambda _, evaluation: replace_text(
        evaluation.folder / "predictions.jsonl", '"accuracy": 100.0', '"accuracy": 0.0'
    ),
    "evaluations/greedy": lambda _, evaluation: replace_text(
        evaluation.folder / "spec.json", '"examples": 50', '"examples": 5'
    ),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=DAMAGES.keys())
def test_every_damage_is_reported(message: str, damage: Damage, grid: Grid, store: Store) -> None:
    record = store.get_record(grid.cells[0])
    damage(record, record.get_evaluation(grid.cells[0].evaluations[0]))
    result = verify_all(grid, store)
    assert any(message in line for line in result.mismatches), result.mismatches
    assert all(line.startswith(grid.cells[0].folder) for line in result.mismatches)


def test_a_rebuilt_teacher_is_a_mismatch_of_its_cells(grid: Grid, store: Store) -> None:
    teacher = store.get_artifact(grid.scale, "teacher", grid.cells[0].training.teacher)
    (teacher.checkpoint / "model.safetensors").write_text("built anew")
    teacher.finish(parameters=1)
    result = verify_all(grid, store)
    assert len(result.mismatches) == 2
    assert all("its teacher" in line and "had another" in line for line in result.mismatches)


def test_changed_data_are_a_mismatch_of_the_records_that_used_them(grid: Grid, store: Store) -> None:
    """The experiment then has other cells, which are missing; its old records are the mismatches."""
    later = build_grid(grid={"lmbda": [0, 1], "beta": [0.5]})
    cells = tuple(change_data(cell, revision="2") for cell in later.cells)
    result = verify_all(replace_cells(later, cells), store)
    assert result.missing == 2
    assert len(result.mismatches) == 4
    assert all("arithmetic was 1, it is 2" in line for line in result.mismatches)


def change_data(cell: Any, **changes: Any) -> Any:
    from dataclasses import replace

    training = cell.training
    models = {
        role: model.model_copy(update={"data": model.data.model_copy(update=changes)})
        for role, model in (("teacher", training.teacher), ("start", training.start))
    }
    return replace(
        cell, training=type(training).model_validate(training.model_copy(update=models).model_dump())
    )


def replace_cells(grid: Grid, cells: tuple[Any, ...]) -> Grid:
    from dataclasses import replace

    return replace(grid, cells=cells)


def test_records_of_another_experiment_are_not_verified(grid: Grid, store: Store) -> None:
    other = build_grid(grid={"lmbda": [0.5], "beta": [0.5]})
    store.get_record(grid.cells[0]).metrics_file.unlink()
    result = verify_all(other, store)
    assert (result.mismatches, result.missing, result.records) == ([], 1, 2)


def test_a_score_with_another_signature_is_noted_and_not_compared(grid: Grid, store: Store) -> None:
    evaluation = store.get_record(grid.cells[0]).get_evaluation(grid.cells[0].evaluations[0])
    outdated = {**evaluation.read_scores()["accuracy"], "signature": "accuracy|rule:older", "value": 1.0}
    change_json(evaluation.folder / "scores.json", accuracy=outdated)
    result = verify_all(grid, store)
    assert result.mismatches == []
    (note,) = result.notes
    assert "accuracy|rule:older" in note


def test_unfinished_records_and_missing_hashes_are_no_mismatch(grid: Grid, store: Store) -> None:
    first, second = (store.get_record(cell) for cell in grid.cells)
    first.status_file.unlink()
    (second.folder / "files.json").unlink()
    result = verify_all(grid, store)
    assert result.mismatches == []
    assert ["no hashes" in note for note in result.notes] == [True]
