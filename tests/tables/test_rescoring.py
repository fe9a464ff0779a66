"""Rescoring a whole experiment: what changes, what stays, and what is said of the rest."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import GridOfCells
from gkd_lab.store import Store
from gkd_lab.tables.rescoring import Change, Outcome, jobs, rescore
from gkd_lab.tables.rescoring_text import rescored_lines, unscored_lines

from .made_store import made_grid
from .written import cell_record, predictions_of, reference_record

ROWS = [(f"{n}?", f"a b {n}", f"a b {n}" if n % 2 else "c") for n in range(6)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def grid_of(*metrics: str, **document: Any) -> GridOfCells:
    evaluations = [{"decoding": "greedy", "metrics": list(metrics or ("exact_match",))}]
    return made_grid(**{"evaluations": evaluations, "grid": {"lmbda": [0, 0.5, 1]}, **document})


def filled(store: Store, **document: Any) -> GridOfCells:
    grid = grid_of(**document)
    for cell in grid.cells:
        cell_record(store, cell, ROWS)
    for role in ("start", "teacher"):
        reference_record(store, grid.cells[0], role, ROWS)
    return grid


def done(grid: GridOfCells, store: Store, metrics: tuple[str, ...] | None = None) -> Outcome:
    work, missing = jobs(grid, store, metrics)
    assert missing == []
    return rescore(work)


def scores(grid: GridOfCells, store: Store) -> list[dict[str, Any]]:
    evaluation = grid.cells[0].evaluations[0]
    return [store.of(cell).evaluation(evaluation).scores() for cell in grid.cells]


def spoil(grid: GridOfCells, store: Store, **changes: Any) -> None:
    """As if an older version had scored."""
    for cell in grid.cells:
        part = store.of(cell).evaluation(cell.evaluations[0])
        found = part.scores()
        found["exact_match"] |= changes
        (part.folder / "scores.json").write_text(json.dumps(found))


def test_changed_metric_code_takes_effect_in_every_record(store: Store) -> None:
    grid = filled(store)
    honest = scores(grid, store)
    spoil(grid, store, value=10.0, signature="an older rule")
    outcome = done(grid, store)
    assert scores(grid, store) == honest
    assert (outcome.evaluations, outcome.predictions, outcome.whole) == (5, 30, True)
    now = honest[0]["exact_match"]["signature"]
    assert list(rescored_lines(outcome, 5)) == [
        "rescored 5 evaluations of 5 records, 30 predictions",
        "arithmetic greedy/exact_match: changed in 3 of 5, mean 10.00 -> 50.00 (+40.00 to +40.00); "
        f"{now}; was an older rule",
    ]
    again = done(grid, store)
    assert list(rescored_lines(again, 5))[1] == "arithmetic greedy/exact_match: unchanged in 5"


def test_an_edited_list_of_metrics_takes_effect_and_the_old_scores_stay(store: Store) -> None:
    grid = filled(store)
    edited = grid_of("rouge1", "accuracy")
    outcome = done(edited, store)
    assert all(set(one) >= {"exact_match", "rouge1", "accuracy"} for one in scores(edited, store))
    lines = list(rescored_lines(outcome, 5))
    assert lines[1].startswith("arithmetic greedy/rouge1: new in 5, mean ")
    assert "; rouge1|measure:f|stem:no" in lines[1]
    assert all("value" in one for one in scores(grid, store)[0].values())


def test_named_metrics_alone_are_computed(store: Store) -> None:
    grid = filled(store)
    spoil(grid, store, value=10.0)
    done(grid, store, ("chrf",))
    assert all(
        one["exact_match"]["value"] == 10.0 and one["chrf"]["value"] > 0 for one in scores(grid, store)
    )


def test_a_record_that_another_process_works_on_is_left_alone(store: Store) -> None:
    grid = filled(store)
    spoil(grid, store, value=10.0)
    held = store.of(grid.cells[1])
    with held.lock():
        outcome = done(grid, store)
    assert outcome.busy == [str(held.folder)]
    assert not outcome.whole
    assert [one["exact_match"]["value"] for one in scores(grid, store)] == [50.0, 10.0, 50.0]
    (line,) = unscored_lines(grid, outcome, [])
    assert line == f"left alone, another process works there: {held.folder}"


def test_damage_is_one_line_and_the_rest_is_done(store: Store) -> None:
    grid = filled(store)
    spoil(grid, store, value=10.0)
    broken, short = (predictions_of(store.of(cell), cell) for cell in grid.cells[:2])
    broken.write_bytes(broken.read_bytes()[:-9])
    short.write_bytes(b"\n".join(short.read_bytes().split(b"\n")[:4]) + b"\n")
    outcome = done(grid, store)
    assert [one["exact_match"]["value"] for one in scores(grid, store)] == [10.0, 10.0, 50.0]
    first, second = unscored_lines(grid, outcome, [])
    assert first.startswith(f"failed: {broken}:6: expected a JSON object, got ")
    assert second == f"failed: {short} is cut short: 4 of 6 predictions are left"


def test_what_was_never_written_is_counted_and_is_no_failure(store: Store) -> None:
    grid = filled(store)
    wider = grid_of(grid={"lmbda": [0, 0.5, 1], "seed": [0, 1]})
    store.of(wider.cells[0]).evaluation(wider.cells[0].evaluations[0]).failed("ValueError: no")
    work, missing = jobs(wider, store, None)
    assert len(work) == 2 + len(grid.cells) - 1
    outcome = rescore(work)
    assert outcome.whole
    (line,) = unscored_lines(wider, outcome, missing)
    assert line.startswith("4 evaluations not finished, so without predictions: ")


def test_a_metric_that_these_predictions_cannot_be_judged_by_is_said_once(store: Store) -> None:
    grid = filled(store)
    before = scores(grid, store)
    outcome = done(grid, store, ("self_bleu",))
    (line,) = unscored_lines(grid, outcome, [])
    assert line.startswith("failed: self_bleu compares several texts of one prompt")
    assert scores(grid, store) == before


def test_reference_models_are_rescored_once_with_what_any_cell_asks(store: Store) -> None:
    filled(store)
    work, _ = jobs(grid_of("rouge1"), store, None)
    assert [len(job.judged) for job in work] == [1] * 5
    assert len({job.record.folder for job in work}) == 5


def test_the_summary_keeps_new_and_changed_apart() -> None:
    changes = [Change("t/m", None, 3.0, None, "s2"), Change("t/m", 1.0, 2.0, "s1", "s2")]
    outcome = Outcome(2, 8, [*changes, Change("t/m", 5.0, 5.0, "s2", "s2")])
    assert list(rescored_lines(outcome, 3))[1] == (
        "t/m: changed in 1 of 3, mean 1.00 -> 2.00 (+1.00 to +1.00); new in 1; s2; was s1"
    )


BLOCK = """
import sys
for name in ("torch", "transformers", "trl", "datasets", "evaluate", "accelerate", "wandb", "lm_eval"):
    sys.modules[name] = None  # importing it raises ImportError
import gkd_lab.report.comparison_text
assert "scipy" not in sys.modules
import gkd_lab.tables.rescoring_text
assert "pandas" not in sys.modules, "neither reads a table"
"""


def test_rescoring_and_comparing_load_neither_torch_nor_pandas() -> None:
    completed = subprocess.run([sys.executable, "-c", BLOCK], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def test_several_processes_do_what_one_does(store: Store) -> None:
    """Enough records for a pool of processes."""
    grid = filled(store, grid={"lmbda": [0], "seed": list(range(98))})
    spoil(grid, store, value=10.0)
    seen: list[int] = []
    work, _ = jobs(grid, store, None)
    outcome = rescore(work, seen.append)
    assert (outcome.evaluations, outcome.whole) == (100, True)
    assert seen == [*range(8, 100, 8), 100]
    assert all(one["exact_match"]["value"] == 50.0 for one in scores(grid, store))
    assert [change.was for change in outcome.changes] == [50.0] * 2 + [10.0] * 98
