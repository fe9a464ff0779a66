"""Grouping cells into packs depends only on the cells of the grid and the limit."""

import random
from typing import Any

import pytest

from gkd_lab.config import Cell, ConfigError
from gkd_lab.config.packs import (
    AUTO_PACK_SIZE,
    PackLimit,
    explain_unpackable,
    group_cells_into_packs,
    parse_pack_limit,
    split_evenly,
)

from .stub import make_grid

AXES: dict[str, list[Any]] = {"lmbda": [1, 0, 0.5], "beta": [1, 0], "seed": [2, 0, 1]}


def keys(groups: list[list[Cell]]) -> list[list[tuple[int, float, float]]]:
    return [[(cell.seed, cell.lmbda, cell.beta) for cell in group] for group in groups]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("lmbda", [0, 0.5]),
        ("beta", [0, 0.5]),
        ("divergence", ["jsd", "tv"]),
        ("rescale_divergence", [False, True]),
        ("teacher_temperature", [0.1, 1]),
        ("student_temperature", [0.5, 1]),
        ("temperature", [0.5, 1]),
        ("learning_rate", [1e-3, 2e-3]),
        ("seed", [0, 1]),
    ],
)
def test_cells_that_differ_in_a_per_cell_setting_share_a_pack(axis: str, values: list[Any]) -> None:
    grid = make_grid(beta=0.1, grid={axis: values}) if axis != "beta" else make_grid(grid={axis: values})
    assert [len(group) for group in group_cells_into_packs(grid.cells, 16)] == [2]


def test_cells_that_differ_in_several_per_cell_settings_share_a_pack() -> None:
    grid = make_grid(grid={"lmbda": [0, 1], "learning_rate": [1e-3, 2e-3], "temperature": [0.5, 1]})
    assert [len(group) for group in group_cells_into_packs(grid.cells, 16)] == [6]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("steps", [1, 2]),
        ("batch_size", [1, 2]),
        ("student", ["small", "large"]),
        ("teacher", ["small", "large"]),
        ("weight_decay", [0, 0.1]),
        ("max_grad_norm", [0, 1]),
        ("warmup_steps", [0, 1]),
        ("loss_normalization", ["token", "sequence"]),
        ("data.train", [10, 20]),
        ("task", ["sums", "words"]),
        ("precision", ["fp32", "fp64"]),
        ("precision", ["fp32", "bf16"]),
        ("tf32", [False, True]),
        ("dropout", [0, 0.1]),
        ("optimizer", ["adamw", "adafactor"]),
    ],
)
def test_cells_that_differ_in_a_shared_setting_do_not_share_a_pack(axis: str, values: list[Any]) -> None:
    assert [len(group) for group in group_cells_into_packs(make_grid(grid={axis: values}).cells, 16)] == [
        1,
        1,
    ]


def test_members_of_a_pack_are_sorted_by_seed_lmbda_and_beta() -> None:
    (group,) = keys(group_cells_into_packs(make_grid(grid=AXES).cells, 99))
    assert group == sorted(group)
    assert len(group) == 18


def test_total_variation_comes_last_in_a_pack() -> None:
    grid = make_grid(grid={"divergence": ["tv", "jsd"], "beta": [1, 0], "lmbda": [1, 0]})
    (group,) = group_cells_into_packs(grid.cells, 16)
    assert [(cell.lmbda, cell.beta) for cell in group] == [
        (lmbda, beta) for lmbda in (0, 1) for beta in (0, 1, None)
    ]


@pytest.mark.parametrize("limit", [1, 4, 7, 18, "auto", "off"])
def test_packs_do_not_depend_on_the_order_of_the_cells(limit: PackLimit) -> None:
    cells = list(make_grid(grid={**AXES, "steps": [1, 2]}).cells)
    wanted = {tuple(cell.fingerprint for cell in group) for group in group_cells_into_packs(cells, limit)}
    random.Random(0).shuffle(cells)
    assert {
        tuple(cell.fingerprint for cell in group) for group in group_cells_into_packs(cells, limit)
    } == wanted


def test_packs_respect_the_limit_and_contain_every_cell() -> None:
    cells = make_grid(grid=AXES).cells
    assert [len(group) for group in group_cells_into_packs(cells, 7)] == [7, 7, 4]
    assert [len(group) for group in group_cells_into_packs(cells, "auto")] == [
        AUTO_PACK_SIZE,
        18 - AUTO_PACK_SIZE,
    ]
    assert [len(group) for group in group_cells_into_packs(cells, "off")] == [1] * 18
    assert {cell for group in group_cells_into_packs(cells, 7) for cell in group} == set(cells)


def test_a_cell_with_dropout_is_unpackable() -> None:
    cells = make_grid(grid={"lmbda": [0, 1]}, dropout=0.1).cells
    assert [len(group) for group in group_cells_into_packs(cells, 16)] == [1, 1]
    assert "dropout" in (explain_unpackable(cells[0]) or "")
    assert explain_unpackable(make_grid().cells[0]) is None


@pytest.mark.parametrize("student", ["owner/tiny", "/a/folder"])
def test_cells_with_a_loaded_student_share_a_pack(student: str) -> None:
    cells = make_grid(grid={"lmbda": [0, 1], "beta": [0, 1]}, student=student).cells
    assert [len(group) for group in group_cells_into_packs(cells, 16)] == [4]
    assert explain_unpackable(cells[0]) is None


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 16])
def test_a_split_pack_is_even_and_its_remainder_splits_alike(limit: int) -> None:
    for cells in range(1, 50):
        sizes = split_evenly(cells, limit)
        assert sum(sizes) == cells
        assert len(sizes) == -(-cells // limit)
        assert sizes[0] <= limit
        assert sizes[0] - sizes[-1] <= 1
        assert sizes[1:] == (split_evenly(cells - sizes[0], limit) if cells > sizes[0] else [])


def test_a_pack_limit_is_auto_off_or_a_number() -> None:
    assert [parse_pack_limit(text) for text in ("auto", "off", "1", "32")] == ["auto", "off", 1, 32]


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "2.5", "²", "AUTO"])
def test_an_invalid_pack_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"auto, off .* 1"):
        parse_pack_limit(text)
