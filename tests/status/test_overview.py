"""What `plan` says of a grid: what varies without being an axis, what collapses, what is not read."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.status.overview import Overview, build_overview
from gkd_lab.status.render import format_listing, list_cells
from gkd_lab.store import Store

from ..tables.synthetic_store import build_grid


def seen(tmp_path: Path, **document: Any) -> Overview:
    return build_overview(build_grid(**document), Store(tmp_path), "auto")


@pytest.mark.parametrize(
    ("axis", "values", "packs"),
    [
        ("precision", ["fp32", "bf16", "fp64"], (1, 1, 1)),
        ("dropout", [0, 0.1], (1, 1)),
        ("loss_normalization", ["sequence", "token"], (1, 1)),
        ("optimizer", ["adamw", "adafactor"], (1, 1)),
        ("divergence", ["jsd", "tv"], (2,)),
        ("rescale_divergence", [False, True], (2,)),
        ("teacher_temperature", [0.1, 1], (2,)),
        ("student_temperature", [0.5, 1], (2,)),
        ("temperature", [0.5, 1], (2,)),
    ],
)
def test_an_axis_makes_a_cell_of_each_value_and_accounts_for_all_that_differs(
    axis: str, values: list[Any], packs: tuple[int, ...], tmp_path: Path
) -> None:
    found = seen(tmp_path, grid={axis: values})
    assert len({view.cell.fingerprint for view in found.cells}) == len(values)
    assert found.pack_sizes == packs
    assert found.collapsed_notes == ()
    assert [note for note in found.notes if "differ" in note] == []


def test_total_variation_collapses_over_beta_and_says_that_it_has_none(tmp_path: Path) -> None:
    found = seen(tmp_path, grid={"divergence": ["jsd", "tv"], "beta": [0, 0.5, 1]})
    (collapsed,) = found.collapsed_notes
    assert collapsed.startswith("3 combinations are one cell")
    assert "divergence=tv beta=0.5" in collapsed
    assert found.notes == ("total variation reads no beta: 1 of 4 cells",)


def test_a_beta_that_the_file_states_is_said_not_to_be_read(tmp_path: Path) -> None:
    note = "total variation reads no beta: 2 of 2 cells"
    assert seen(tmp_path, divergence="tv", beta=0.5, grid={"lmbda": [0, 1]}).notes == (note,)
    assert seen(tmp_path, divergence="tv", grid={"lmbda": [0, 1]}).notes == ()


def test_a_cell_without_beta_is_listed_with_a_dash(tmp_path: Path) -> None:
    grid = build_grid(grid={"divergence": ["tv", "jsd"], "lmbda": [0.5]})
    listing = list_cells(grid, build_overview(grid, Store(tmp_path), "auto"), show_progress=False)
    header, tv, jsd = format_listing(listing).splitlines()
    assert header.split()[2:6] == ["lmbda", "beta", "seed", "divergence"]
    assert tv.split()[2:6] == ["0.5", "-", "0", "tv"]
    assert jsd.split()[2:6] == ["0.5", "0.5", "0", "jsd"]
