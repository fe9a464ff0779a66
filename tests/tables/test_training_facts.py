"""What plan and report say of the models that cells start from."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import Grid
from gkd_lab.config.cell import Reference, list_references
from gkd_lab.store import Store
from gkd_lab.tables import training_facts
from gkd_lab.tables.training_facts import (
    describe_references,
    get_start_key,
    list_start_warnings,
)

from .synthetic_store import build_grid, write_finished_record

STUDENT = {"layers": 1, "width": 8, "heads": 2, "init_seed": "cell", "sft": {"steps": 4, "rows": 5}}


def write_start(tmp_path: Path, test: float, train: float | None, **document: Any) -> tuple[Grid, Reference]:
    """Write the record of a grid's SFT student with its scores."""
    grid = build_grid(student=STUDENT, **document)
    (start,) = (item for item in list_references(grid.cells) if item.role == "start")
    record = Store(tmp_path).get_artifact(grid.scale, "start", start.model)
    write_finished_record(record, start.cells[0], test)
    facts = {} if train is None else {"train_score": {"metric": "accuracy", "value": train, "rows": 5}}
    record.mark_done(**facts)
    return grid, start


def test_a_start_is_described_by_its_test_and_its_train_score(tmp_path: Path) -> None:
    grid, _ = write_start(tmp_path, 18.4, 100.0)
    (text,) = describe_references(grid, Store(tmp_path))
    assert text == "start arithmetic/custom, 5 rows: accuracy 18.4, on 5 of its training rows 100.0"
    assert list_start_warnings(grid, Store(tmp_path)) == []


def test_a_start_without_scores_is_not_described(tmp_path: Path) -> None:
    grid = build_grid(student=STUDENT)
    assert describe_references(grid, Store(tmp_path)) == list_start_warnings(grid, Store(tmp_path)) == []


def test_a_start_that_has_not_learned_its_rows_is_warned_of(tmp_path: Path) -> None:
    grid, _ = write_start(tmp_path, 51.6, 53.0)
    (warning,) = list_start_warnings(grid, Store(tmp_path))
    assert "arithmetic/custom" in warning and "has not learned its training rows (53.0 on 5" in warning


@pytest.mark.parametrize(("score", "count"), [(19.4, 1), (48.0, 1), (50.0, 0), (55.0, 0), (57.2, 1)])
def test_a_start_unlike_the_committed_ones_is_warned_of(
    score: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, start = write_start(tmp_path, score, None, grid={"seed": [7]})
    committed = {"metric": "accuracy", "low": 51.6, "high": 54.0, "seeds": 5, "table": "lambda_beta"}
    monkeypatch.setattr(training_facts, "_load_committed_starts", lambda: {get_start_key(start): committed})
    warnings = list_start_warnings(grid, Store(tmp_path))
    assert len(warnings) == count
    if warnings:
        assert f"has accuracy {score}; the 5 behind the committed table lambda_beta" in warnings[0]


def test_starts_of_all_seeds_share_a_key_and_those_of_other_rows_do_not() -> None:
    axes = {"student.sft.rows": [5, 40], "seed": [0, 1]}
    student = {**STUDENT, "sft": {"steps": 4}}
    references = list_references(build_grid(student=student, grid=axes).cells)
    starts = [item for item in references if item.role == "start"]
    assert len(starts) == 4 and len({get_start_key(item) for item in starts}) == 2


def test_the_committed_ranges_are_those_of_committed_tables() -> None:
    stored = json.loads(Path(training_facts.__file__).with_name("committed_starts.json").read_text())
    script = runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "starts.py"))
    assert stored == script["collect_all_starts"](), "run `make notebooks`"
