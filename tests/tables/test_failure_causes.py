"""Failures of a grid: one line for each cause, whatever it stopped."""

from pathlib import Path

from gkd_lab.config import Grid
from gkd_lab.store import Store
from gkd_lab.tables.failure_causes import format_failures, group_failures, list_failures

from .synthetic_store import build_grid

GRID = build_grid()


def format_grid(store: Store, grid: Grid = GRID) -> list[str]:
    return format_failures(list_failures(grid, store))


def test_cells_that_fail_for_one_reason_are_one_line_with_count_and_first_names(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step, cell in enumerate(GRID.cells[:5]):
        store.get_record(cell).mark_failed(f"FloatingPointError: the loss is nan at step {step}", "Traceback")
    store.get_record(GRID.cells[7]).mark_failed("RuntimeError: another one")
    first, other = format_grid(store)
    names = ", ".join(cell.folder for cell in GRID.cells[:3])
    file = store.get_record(GRID.cells[0]).status_file
    assert first == (
        f"5 cells: FloatingPointError: the loss is nan at step 0: {names} and 2 more "
        f"(see {file}; --retry-failed tries again)"
    )
    assert other.startswith(f"{GRID.cells[7].folder}: RuntimeError: another one (see ")
    assert [len(group) for group in group_failures(list_failures(GRID, store))] == [5, 1]


def test_models_that_fail_for_one_reason_are_one_line_with_the_cells_they_stop(tmp_path: Path) -> None:
    store, training = Store(tmp_path), GRID.cells[0].training
    store.get_artifact("nano", "teacher", training.teacher).mark_failed("rows.jsonl:4: no field 'answer'")
    (line,) = format_grid(store)
    assert line.startswith(
        "teacher arithmetic/teacher: rows.jsonl:4: no field 'answer'; 9 cells were not run ("
    )
    store.get_artifact("nano", "start", training.start).mark_failed("rows.jsonl:4: no field 'answer'")
    (line,) = format_grid(store)
    assert line.startswith("teacher arithmetic/teacher and start arithmetic/small: rows.jsonl:4: no field")
    assert line.count("rows.jsonl") == 1 and "; 9 cells were not run (see " in line


def test_rows_of_a_file_are_causes_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, cell in enumerate(GRID.cells[:2]):
        store.get_record(cell).mark_failed(f"rows.jsonl:{number}: damaged")
    assert len(format_grid(store)) == 2


def test_evaluations_are_counted_apart_from_cells(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for cell in GRID.cells[:2]:
        store.get_record(cell).get_evaluation(cell.evaluations[0]).mark_failed("out of memory: take less")
    store.get_record(GRID.cells[2]).mark_failed("out of memory: take less")
    (line,) = format_grid(store)
    assert line.startswith("1 cell and 2 evaluations: out of memory: take less: ")


def test_a_grid_without_failures_has_no_lines(tmp_path: Path) -> None:
    assert format_grid(Store(tmp_path)) == []
