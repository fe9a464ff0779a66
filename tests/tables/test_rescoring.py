"""Rescoring an experiment: changed scores, kept scores, and lines for everything else."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import Grid
from gkd_lab.store import Store
from gkd_lab.tables.rescoring import (
    RescoreOutcome,
    ScoreChange,
    collect_rescore_jobs,
    format_rescored_lines,
    format_unscored_lines,
    rescore_records,
)

from .prediction_records import get_predictions_path, write_cell_record, write_reference_record
from .synthetic_store import build_grid

PREDICTIONS = [(f"{n}?", f"a b {n}", f"a b {n}" if n % 2 else "c") for n in range(6)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def build_metric_grid(*metrics: str, **document: Any) -> Grid:
    evaluations = [{"decoding": "greedy", "metrics": list(metrics or ("exact_match",))}]
    return build_grid(**{"evaluations": evaluations, "grid": {"lmbda": [0, 0.5, 1]}, **document})


def write_grid_records(store: Store, **document: Any) -> Grid:
    grid = build_metric_grid(**document)
    for cell in grid.cells:
        write_cell_record(store, cell, PREDICTIONS)
    for role in ("start", "teacher"):
        write_reference_record(store, grid.cells[0], role, PREDICTIONS)
    return grid


def rescore_grid(grid: Grid, store: Store, metrics: tuple[str, ...] | None = None) -> RescoreOutcome:
    work, missing = collect_rescore_jobs(grid, store, metrics)
    assert missing == []
    return rescore_records(work)


def read_scores(grid: Grid, store: Store) -> list[dict[str, Any]]:
    evaluation = grid.cells[0].evaluations[0]
    return [store.get_record(cell).get_evaluation(evaluation).read_scores() for cell in grid.cells]


def overwrite_scores(grid: Grid, store: Store, **changes: Any) -> None:
    """Replace fields of the stored scores, as if an older version had scored."""
    for cell in grid.cells:
        part = store.get_record(cell).get_evaluation(cell.evaluations[0])
        scores = part.read_scores()
        scores["exact_match"] |= changes
        (part.folder / "scores.json").write_text(json.dumps(scores))


def test_changed_metric_code_takes_effect_in_every_record(store: Store) -> None:
    grid = write_grid_records(store)
    honest = read_scores(grid, store)
    overwrite_scores(grid, store, value=10.0, signature="an older rule")
    outcome = rescore_grid(grid, store)
    assert read_scores(grid, store) == honest
    assert (outcome.evaluation_count, outcome.prediction_count, outcome.is_complete) == (5, 30, True)
    now = honest[0]["exact_match"]["signature"]
    total, line = format_rescored_lines(outcome, 5)
    assert "5 evaluations of 5 records, 30 predictions" in total
    name, _, changes = line.partition(": ")
    assert name == "arithmetic greedy/exact_match"
    counts, *signatures = changes.split("; ")
    assert re.findall(r"[-+]?\d[\d.]*", counts) == ["3", "5", "10.00", "50.00", "+40.00", "+40.00"]
    assert signatures == [now, "was an older rule"]
    again = rescore_grid(grid, store)
    assert list(format_rescored_lines(again, 5))[1].endswith("exact_match: unchanged in 5")


def test_an_edited_list_of_metrics_takes_effect_and_the_old_scores_stay(store: Store) -> None:
    grid = write_grid_records(store)
    edited = build_metric_grid("rouge1", "accuracy")
    outcome = rescore_grid(edited, store)
    assert all({"exact_match", "rouge1", "accuracy"} <= set(scores) for scores in read_scores(edited, store))
    lines = list(format_rescored_lines(outcome, 5))
    assert lines[1].startswith("arithmetic greedy/rouge1: new in 5,")
    assert "; rouge1|measure:f|stem:no" in lines[1]
    assert all("value" in score for score in read_scores(grid, store)[0].values())


def test_named_metrics_alone_are_computed(store: Store) -> None:
    grid = write_grid_records(store)
    overwrite_scores(grid, store, value=10.0)
    rescore_grid(grid, store, ("chrf",))
    assert all(
        row["exact_match"]["value"] == 10.0 and row["chrf"]["value"] > 0 for row in read_scores(grid, store)
    )


def test_a_locked_record_is_left_alone(store: Store) -> None:
    grid = write_grid_records(store)
    overwrite_scores(grid, store, value=10.0)
    held = store.get_record(grid.cells[1])
    with held.lock():
        outcome = rescore_grid(grid, store)
    assert outcome.locked_folders == [str(held.folder)]
    assert not outcome.is_complete
    assert [row["exact_match"]["value"] for row in read_scores(grid, store)] == [50.0, 10.0, 50.0]
    (line,) = format_unscored_lines(grid, outcome, [])
    assert str(held.folder) in line


def test_a_damaged_record_is_one_line_and_the_others_are_rescored(store: Store) -> None:
    grid = write_grid_records(store)
    overwrite_scores(grid, store, value=10.0)
    broken, short = (get_predictions_path(store.get_record(cell), cell) for cell in grid.cells[:2])
    broken.write_bytes(broken.read_bytes()[:-9])
    short.write_bytes(b"\n".join(short.read_bytes().split(b"\n")[:4]) + b"\n")
    outcome = rescore_grid(grid, store)
    assert [row["exact_match"]["value"] for row in read_scores(grid, store)] == [10.0, 10.0, 50.0]
    first, second = format_unscored_lines(grid, outcome, [])
    assert f"{broken}:6" in first and "JSON object" in first
    assert str(short) in second and "4 of 6" in second


def test_missing_predictions_are_counted_and_are_no_failure(store: Store) -> None:
    grid = write_grid_records(store)
    wider = build_metric_grid(grid={"lmbda": [0, 0.5, 1], "seed": [0, 1]})
    store.get_record(wider.cells[0]).get_evaluation(wider.cells[0].evaluations[0]).mark_failed(
        "ValueError: no"
    )
    work, missing = collect_rescore_jobs(wider, store, None)
    assert len(work) == 2 + len(grid.cells) - 1
    outcome = rescore_records(work)
    assert outcome.is_complete
    (line,) = format_unscored_lines(wider, outcome, missing)
    assert line.startswith("4 evaluations ")


def test_a_metric_that_does_not_apply_is_reported_once(store: Store) -> None:
    grid = write_grid_records(store)
    before = read_scores(grid, store)
    outcome = rescore_grid(grid, store, ("self_bleu",))
    (line,) = format_unscored_lines(grid, outcome, [])
    assert "self_bleu" in line
    assert read_scores(grid, store) == before


def test_reference_models_are_rescored_once_with_the_metrics_of_all_cells(store: Store) -> None:
    write_grid_records(store)
    work, _ = collect_rescore_jobs(build_metric_grid("rouge1"), store, None)
    assert [len(job.evaluations) for job in work] == [1] * 5
    assert len({job.record.folder for job in work}) == 5


def test_the_summary_keeps_new_and_changed_apart() -> None:
    changes = [ScoreChange("t/m", None, 3.0, None, "s2"), ScoreChange("t/m", 1.0, 2.0, "s1", "s2")]
    outcome = RescoreOutcome(2, 8, [*changes, ScoreChange("t/m", 5.0, 5.0, "s2", "s2")])
    changed, new, signature, old_signature = list(format_rescored_lines(outcome, 3))[1].split("; ")
    assert re.findall(r"[-+]?\d[\d.]*", changed) == ["1", "3", "1.00", "2.00", "+1.00", "+1.00"]
    assert (new, signature, old_signature) == ("new in 1", "s2", "was s1")


IMPORT_SCRIPT = """
import sys
for name in ("torch", "transformers", "trl", "datasets", "evaluate", "accelerate", "wandb", "lm_eval"):
    sys.modules[name] = None  # importing it raises ImportError
import gkd_lab.report.comparison_text
assert "scipy" not in sys.modules
import gkd_lab.tables.rescoring
assert "pandas" not in sys.modules, "neither reads a table"
"""


def test_rescoring_and_comparing_load_neither_torch_nor_pandas() -> None:
    completed = subprocess.run([sys.executable, "-c", IMPORT_SCRIPT], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def test_several_processes_give_the_outcome_of_one(store: Store) -> None:
    """Enough records for a pool of processes."""
    grid = write_grid_records(store, grid={"lmbda": [0], "seed": list(range(98))})
    overwrite_scores(grid, store, value=10.0)
    seen: list[int] = []
    work, _ = collect_rescore_jobs(grid, store, None)
    outcome = rescore_records(work, seen.append)
    assert (outcome.evaluation_count, outcome.is_complete) == (100, True)
    assert seen == [*range(8, 100, 8), 100]
    assert all(row["exact_match"]["value"] == 50.0 for row in read_scores(grid, store))
    assert [change.old_value for change in outcome.changes] == [50.0] * 2 + [10.0] * 98
