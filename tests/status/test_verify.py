"""`verify` finds every byte that no longer is what a fingerprint, a hash or a score stands for."""

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

WRITTEN = [("1 + 1 =", "#### 2", "#### 2"), ("1 + 2 =", "#### 4", "#### 3"), ("2 + 2 =", "#### 4", "#### 4")]


@pytest.fixture(scope="module")
def grid() -> Grid:
    return build_grid(grid={"lmbda": [0, 1], "beta": [0.5]})


@pytest.fixture(scope="module")
def whole(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both reference models and both cells, finished as a run finishes them."""
    found = Store(tmp_path_factory.mktemp("whole"))
    for role, model, cells in list_references(grid.cells):
        record = found.get_artifact(grid.scale, role, model)
        record.write_spec(model, role=role)
        weigh(record, role)
        record.write_provenance(collect_provenance())
        record.finish(parameters=1)
        write_predictions(record, cells[0].evaluations[0], WRITTEN)  # type: ignore[arg-type]
    for cell in grid.cells:
        record = found.get_record(cell)
        record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
        record.rewind_history(0)
        record.log_row({"step": 10, "loss": 0.5})
        weigh(record, cell.fingerprint)
        record.write_provenance(collect_provenance(**describe_sources(cell.training, cell.scale, found)))
        record.finish(steps=10)
        write_predictions(record, cell.evaluations[0], WRITTEN)  # type: ignore[arg-type]
    return found.root


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Store:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "outputs")
    return Store(tmp_path / "outputs")


def weigh(record: Record, content: str) -> None:
    record.checkpoint.mkdir()
    (record.checkpoint / "model.safetensors").write_text(content)


def verified(grid: Grid, store: Store) -> VerificationResult:
    return verify_records(grid, store, list_candidate_records(grid, store))


def test_a_finished_experiment_matches(grid: Grid, store: Store) -> None:
    found = verified(grid, store)
    assert (found.mismatches, found.notes, found.missing) == ([], [], 0)
    assert (found.records, found.evaluations) == (4, 4)
    assert found.files == 2 * 3 + 2 * 4


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


Damage = Callable[[Record, EvaluationRecord], object]
DAMAGES: dict[str, Damage] = {
    "spec.json was": lambda record, _: rewrite(record.folder / "spec.json", '"steps": 10', '"steps": 20'),
    "spec.json has format 0": lambda record, _: change(record.folder / "spec.json", format=0),
    "spec.json is no Training: steps": lambda record, _: rewrite(
        record.folder / "spec.json", '"steps": 10', '"steps": -1'
    ),
    "spec.json is missing or damaged": lambda record, _: (record.folder / "spec.json").write_text("{"),
    "status.json is damaged": lambda record, _: record.status_file.write_text('{"state": "do'),
    "checkpoint/model.safetensors has changed": lambda record, _: (
        record.checkpoint / "model.safetensors"
    ).write_text("other"),
    "metrics.jsonl is missing": lambda record, _: record.metrics_file.unlink(),
    "provenance.json is missing or damaged": lambda record, _: (record.folder / "provenance.json").unlink(),
    "names data 0, not its own": lambda record, _: change(
        record.folder / "provenance.json", data={"revision": "0"}
    ),
    "predictions.jsonl is cut short: 2 of 3": lambda _, part: (part.folder / "predictions.jsonl").write_text(
        "".join((part.folder / "predictions.jsonl").read_text().splitlines(keepends=True)[:2])
    ),
    "predictions.jsonl:1: expected a JSON object": lambda _, part: rewrite(
        part.folder / "predictions.jsonl", "{", ""
    ),
    "predictions.jsonl is missing": lambda _, part: (part.folder / "predictions.jsonl").unlink(),
    "accuracy is 66.6": lambda _, part: rewrite(part.folder / "predictions.jsonl", "#### 2", "#### 9"),
    "accuracy is 70.0 in scores.json, 66.6": lambda _, part: change(
        part.folder / "scores.json", accuracy={**part.read_scores()["accuracy"], "value": 70.0}
    ),
    "scores.json has no accuracy": lambda _, part: (part.folder / "scores.json").write_text("{}"),
    "accuracy of 1 predictions": lambda _, part: rewrite(
        part.folder / "predictions.jsonl", '"accuracy": 100.0', '"accuracy": 0.0'
    ),
    "evaluations/greedy": lambda _, part: rewrite(
        part.folder / "spec.json", '"examples": 50', '"examples": 5'
    ),
}


@pytest.mark.parametrize(("said", "damage"), DAMAGES.items(), ids=DAMAGES.keys())
def test_every_damage_is_reported(said: str, damage: Damage, grid: Grid, store: Store) -> None:
    record = store.get_record(grid.cells[0])
    damage(record, record.get_evaluation(grid.cells[0].evaluations[0]))
    found = verified(grid, store)
    assert any(said in line for line in found.mismatches), found.mismatches
    assert all(line.startswith(grid.cells[0].folder) for line in found.mismatches)


def test_a_teacher_that_was_built_anew_is_not_the_one_that_cells_were_made_with(
    grid: Grid, store: Store
) -> None:
    teacher = store.get_artifact(grid.scale, "teacher", grid.cells[0].training.teacher)
    (teacher.checkpoint / "model.safetensors").write_text("built anew")
    teacher.finish(parameters=1)
    found = verified(grid, store)
    assert len(found.mismatches) == 2
    assert all("its teacher" in line and "had another" in line for line in found.mismatches)


def test_data_that_changed_are_reported_with_the_records_that_were_made_of_them(
    grid: Grid, store: Store
) -> None:
    """The experiment's cells are others then: all are missing, and those of before are named."""
    later = build_grid(grid={"lmbda": [0, 1], "beta": [0.5]})
    cells = tuple(_with_data(cell, revision="2") for cell in later.cells)
    found = verified(_replaced(later, cells), store)
    assert found.missing == 2
    assert len(found.mismatches) == 4
    assert all("data arithmetic arithmetic was 1, it is 2 now" in line for line in found.mismatches)


def _with_data(cell: Any, **changes: Any) -> Any:
    from dataclasses import replace

    training = cell.training
    models = {
        role: model.model_copy(update={"data": model.data.model_copy(update=changes)})
        for role, model in (("teacher", training.teacher), ("start", training.start))
    }
    return replace(
        cell, training=type(training).model_validate(training.model_copy(update=models).model_dump())
    )


def _replaced(grid: Grid, cells: tuple[Any, ...]) -> Grid:
    from dataclasses import replace

    return replace(grid, cells=cells)


def test_another_experiments_records_are_left_alone(grid: Grid, store: Store) -> None:
    other = build_grid(grid={"lmbda": [0.5], "beta": [0.5]})
    store.get_record(grid.cells[0]).metrics_file.unlink()
    found = verified(other, store)
    assert (found.mismatches, found.missing, found.records) == ([], 1, 2)


def test_a_score_of_another_version_is_noted_and_not_compared(grid: Grid, store: Store) -> None:
    part = store.get_record(grid.cells[0]).get_evaluation(grid.cells[0].evaluations[0])
    was = {**part.read_scores()["accuracy"], "signature": "accuracy|rule:older", "value": 1.0}
    change(part.folder / "scores.json", accuracy=was)
    found = verified(grid, store)
    assert found.mismatches == []
    (note,) = found.notes
    assert "accuracy was computed as accuracy|rule:older" in note


def test_what_is_not_finished_or_was_recorded_before_is_no_mismatch(grid: Grid, store: Store) -> None:
    first, second = (store.get_record(cell) for cell in grid.cells)
    first.status_file.unlink()
    (second.folder / "files.json").unlink()
    found = verified(grid, store)
    assert found.mismatches == []
    assert ["no hashes" in note for note in found.notes] == [True]
