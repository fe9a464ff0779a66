"""Students that have seen few rows, and students of their cell's seed."""

from typing import Any

import pytest

from gkd_lab.config.packs import group_cells_into_packs

from .stub import get_refusal, make_cell, make_grid


def test_rows_of_the_sft_are_an_axis_that_keeps_the_default_student() -> None:
    grid = make_grid(grid={"student.sft.rows": [10, 100], "lmbda": [0, 1]})
    starts = {cell.labels["student.sft.rows"]: cell.training.start for cell in grid.cells}
    assert {label: start.sft.rows for label, start in starts.items() if start.sft} == {10: 10, 100: None}
    assert {start.model.name for start in starts.values()} == {"small"}
    assert starts[100] == make_cell().training.start
    assert [cell.training.train_rows for cell in grid.cells] == [10, 10, None, None]


def test_the_axis_is_set_at_the_command_line_and_joins_the_fields_of_the_file() -> None:
    grid = make_grid(
        {"student.sft.rows": "10,20"},
        student={"size": "large", "init_seed": 3, "sft": {"steps": 7}},
        grid={"student.sft.rows": [10]},
    )
    models = [cell.training.start for cell in grid.cells]
    stated = [(m.model.init_seed, m.sft.steps, m.sft.rows) for m in models if m.sft is not None]
    assert stated == [(3, 7, 10), (3, 7, 20)]


def test_a_stated_number_of_training_rows_wins_over_those_of_the_sft() -> None:
    student = {"sft": {"rows": 10}}
    assert [
        make_cell(student=student, **changes).training.train_rows
        for changes in ({}, {"train_rows": 50}, {"train_rows": "all"})
    ] == [10, 50, None]


def test_a_seed_of_the_cell_makes_one_student_per_seed_and_one_pack() -> None:
    student = {"size": "small", "init_seed": "cell", "sft": {"seed": "cell"}}
    grid = make_grid(student=student, grid={"lmbda": [0, 1], "seed": [5, 6]})
    seeds = {(c.seed, c.training.start.model.init_seed, c.training.start.sft.seed) for c in grid.cells}  # type: ignore[union-attr]
    assert seeds == {(5, 5, 5), (6, 6, 6)}
    assert len({cell.training.start.fingerprint for cell in grid.cells}) == 2
    assert len({cell.training.teacher.fingerprint for cell in grid.cells}) == 1
    assert [len(pack) for pack in group_cells_into_packs(grid.cells, "auto")] == [4]


def test_a_loss_against_the_start_takes_the_start_of_the_seed() -> None:
    student = {"size": "small", "init_seed": "cell"}
    cells = make_grid(
        student=student, reward="exact_match", alpha=0.5, anchor="start", grid={"seed": [5, 6]}
    ).cells
    assert [cell.training.teachers for cell in cells] == [(cell.training.start,) for cell in cells]


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"teacher": {"size": "large", "init_seed": "cell"}}, "teacher"),
        ({"teacher": {"size": "large", "sft": {"seed": "cell"}}}, "teacher"),
        ({"student": {"sft": {"rows": 0}}}, "student.sft.rows"),
        ({"grid": {"student.sft.row": [10]}}, "student.sft.rows"),
        ({"student": {"init_seed": "cells"}}, "init_seed"),
        ({"student": {"sft": {"rows": 3}}}, "batch_size"),
        ({"train_rows": 3}, "batch_size"),
        ({"batch_size": 101}, "at most 100"),
    ],
)
def test_seeds_and_rows_that_have_no_meaning_are_refused(document: dict[str, Any], named: str) -> None:
    assert named in get_refusal(**document)
