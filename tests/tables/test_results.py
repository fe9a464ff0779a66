"""Results that the index of a store holds equal those of its records; JSON of rows equals that of frames."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gkd_lab.config.cell import LmEvalEvaluation
from gkd_lab.store import Store, index
from gkd_lab.store.files import write_text
from gkd_lab.tables.formats import encode_json, encode_markdown
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.results import list_models, read_results
from gkd_lab.tables.rows import TableRow, build_table_rows, build_wide_rows
from gkd_lab.tables.table import build_wide_table, convert_integers, encode_table

from .synthetic_store import build_grid, fill_store, write_evaluation

LONG_AGO = 1_700_000_000
GRID = build_grid(evaluations=[{"decoding": "greedy"}, {"decoding": "sample", "temperature": 0.5}])
CELL = GRID.cells[3]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A finished store, all files of which are old, that has an index from the first record on."""
    monkeypatch.setattr(index, "_MIN_RECORDS", 1)
    store = Store(tmp_path)
    fill_store(GRID, store)
    make_old(tmp_path)
    return store


def make_old(folder: Path) -> None:
    """Set the times of all files and folders to the same long past one."""
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))


def get_row(store: Store) -> TableRow:
    """Return the wide row of the cell."""
    (row,) = (row for row in build_wide_rows(GRID, store) if row["cell"] == CELL.fingerprint)
    return row


def get_scores_file(store: Store) -> Path:
    return store.get_record(CELL).get_evaluation(CELL.evaluations[0]).folder / "scores.json"


def test_the_second_table_is_built_from_the_index_and_equals_the_first(store: Store) -> None:
    first, long = build_wide_rows(GRID, store), build_long_table(GRID, store)
    entries = json.loads((store.root / ".cache" / "scores.json").read_text())["records"]
    assert len(entries) == len(GRID.cells) + 2
    assert encode_json(build_wide_rows(GRID, store)) == encode_json(first)
    assert encode_table(build_long_table(GRID, store), "json") == encode_table(long, "json")
    # A file that changed in place, with its old time and size, is not read again: the index was used.
    path = get_scores_file(store)
    path.write_text(path.read_text().replace("50.0", "60.0"))
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert get_row(store)["greedy/accuracy"] == first[5]["greedy/accuracy"] != 60.0


def test_what_changed_is_read_again(store: Store) -> None:
    assert get_row(store)["status"] == "done"
    write_evaluation(store.get_record(CELL), CELL.evaluations[0], 12.0)
    assert get_row(store)["greedy/accuracy"] == 12.0
    store.get_record(CELL).get_evaluation(CELL.evaluations[1]).status_file.unlink()
    with store.get_record(CELL).lock():
        assert get_row(store)["evaluations"] == {"greedy": "done", "sample0.5": "running"}
    assert get_row(store)["status"] == "missing" and get_row(store)["sample0.5/accuracy"] is None
    store.get_record(CELL).mark_failed("RuntimeError: out of memory")
    assert (get_row(store)["status"], get_row(store)["error"]) == ("failed", "RuntimeError: out of memory")
    store.get_record(CELL).status_file.unlink()
    assert get_row(store)["status"] == "missing"


def test_seconds_of_an_unbroken_training_come_from_the_index_and_follow_its_provenance(store: Store) -> None:
    record = store.get_record(CELL)

    def read_step_seconds() -> list[float]:
        long = build_long_table(GRID, store)
        chosen = (long["cell"] == CELL.fingerprint) & (long["metric"] == "step_seconds")
        return list(long[chosen]["value"])

    assert read_step_seconds() == []
    record.write_provenance({"pack": ["a"], "spent": {"seconds": 5.0}})
    os.utime(record.folder / "provenance.json", (LONG_AGO, LONG_AGO))
    steps = CELL.training.steps
    assert read_step_seconds() == [5.0 / steps]
    path = record.folder / "provenance.json"
    path.write_text(path.read_text().replace("5.0", "7.0"))  # in place, with its old time and size
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert read_step_seconds() == [5.0 / steps]
    record.write_provenance({"pack": ["a", "b"], "spent": {"seconds": 5.0}})
    assert read_step_seconds() == []


def test_an_added_lm_eval_task_appears_although_the_record_is_in_the_index(store: Store) -> None:
    assert list(get_row(store)["evaluations"]) == ["greedy", "sample0.5"]
    task = LmEvalEvaluation(lm_eval="0.4", task="mmlu")
    part = store.get_record(CELL).get_evaluation(task)
    part.folder.mkdir()
    make_old(store.get_record(CELL).folder / "evaluations")
    get_row(store)  # the index has a record whose new folder is still empty
    part.write_results(task, [], {"acc": {"value": 0.25}})
    assert get_row(store)["mmlu/acc"] == 0.25
    make_old(store.get_record(CELL).folder / "evaluations")
    get_row(store)
    write_text(part.folder / "scores.json", json.dumps({"acc": {"value": 0.5}}))
    assert get_row(store)["mmlu/acc"] == 0.5


def test_a_damaged_index_is_ignored(store: Store) -> None:
    expected = read_results(list_models(GRID, store), store)
    (store.root / ".cache" / "scores.json").write_text("{")
    assert read_results(list_models(GRID, store), store) == expected


@pytest.mark.parametrize(
    "values",
    [
        [{"value": 7}, {"value": 8}],
        [{"value": 7}, {"value": 8.5}],
        [{"value": 7}, {}],
        [{"value": None}, {"value": 7.0}],
        [{"value": 0.5, "low": None}, {"value": 1, "low": 0}],
    ],
)
def test_rows_have_the_kinds_of_numbers_that_the_frame_has(
    values: list[dict[str, Any]], tmp_path: Path
) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "train_rows": [5, 10], "max_grad_norm": [1, 0.5]})
    store = Store(tmp_path)
    for number, model in enumerate(list_models(grid, store)):
        scores = {"accuracy": {"value": 50.0}, "extra": values[number % len(values)]}
        model.record.get_evaluation(grid.cells[0].evaluations[0]).write_results(
            grid.cells[0].evaluations[0], [], scores
        )
        model.record.finish()
    rows, table_rows = build_wide_rows(grid, store), build_table_rows(grid, store)
    inferred = pd.DataFrame(table_rows, columns=list(rows[0])).astype({"lmbda": float, "beta": float})
    for name in ("seed", "train_rows", "max_grad_norm"):
        inferred[name] = convert_integers([row[name] for row in table_rows])
    for frame in (inferred, build_wide_table(grid, store)):
        assert encode_json(rows) == encode_table(frame, "json")
        assert encode_markdown(rows) == encode_table(frame, "md")
    assert [type(rows[-1][name]) for name in ("seed", "train_rows", "lmbda", "max_grad_norm")] == [
        int, int, float, float,
    ]  # fmt: skip
