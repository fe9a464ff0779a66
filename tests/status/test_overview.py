"""Overview of a grid: packs, notes, names of starts, the listing."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.status.overview import Overview, build_overview
from gkd_lab.status.render import format_listing, list_cells
from gkd_lab.store import Store

from ..tables.synthetic_store import build_grid


def build_grid_overview(tmp_path: Path, **document: Any) -> Overview:
    return build_overview(build_grid(**document), Store(tmp_path), "auto")


@pytest.mark.parametrize(
    ("axis", "values", "packs"),
    [
        ("precision", ["fp32", "bf16", "fp64"], (1, 1, 1)),
        ("tf32", [False, True], (1, 1)),
        ("teacher", ["teacher", {"size": "teacher", "dtype": "bfloat16"}], (1, 1)),
        ("dropout", [0, 0.1], (1, 1)),
        ("loss_normalization", ["sequence", "token"], (1, 1)),
        ("implementation", ["gkd_lab", "trl"], (1, 1)),
        ("optimizer", ["adamw", "adafactor"], (1, 1)),
        ("divergence", ["jsd", "tv"], (2,)),
        ("rescale_divergence", [False, True], (2,)),
        ("teacher_temperature", [0.1, 1], (2,)),
        ("student_temperature", [0.5, 1], (2,)),
        ("temperature", [0.5, 1], (2,)),
    ],
)
def test_each_value_of_an_axis_is_a_cell_and_no_other_field_differs(
    axis: str, values: list[Any], packs: tuple[int, ...], tmp_path: Path
) -> None:
    overview = build_grid_overview(tmp_path, grid={axis: values})
    assert len({view.cell.fingerprint for view in overview.cells}) == len(values)
    assert overview.pack_sizes == packs
    assert overview.collapsed_notes == ()
    assert [note for note in overview.notes if "differ" in note] == []


def test_cells_of_trl_run_alone_with_a_note(tmp_path: Path) -> None:
    grid = {"implementation": ["gkd_lab", "trl"], "lmbda": [0, 1], "beta": [0, 0.5]}
    overview = build_grid_overview(tmp_path, grid=grid)
    assert overview.pack_sizes == (4, 1, 1, 1, 1)
    alone = {view.cell.training.implementation for view in overview.cells if view.unpacked_reason}
    assert alone == {"trl"}
    (note,) = overview.notes
    assert note.startswith("4 cells run alone: TRL")


def test_a_cell_without_beta_is_listed_with_a_dash(tmp_path: Path) -> None:
    grid = build_grid(grid={"divergence": ["tv", "jsd"], "lmbda": [0.5]})
    listing = list_cells(grid, build_overview(grid, Store(tmp_path), "auto"), show_progress=False)
    header, tv, jsd = format_listing(listing).splitlines()
    assert header.split()[2:6] == ["lmbda", "beta", "seed", "divergence"]
    assert tv.split()[2:6] == ["0.5", "-", "0", "tv"]
    assert jsd.split()[2:6] == ["0.5", "0.5", "0", "jsd"]


def test_passes_over_the_rows_are_noted_where_their_number_is_known(tmp_path: Path) -> None:
    """10 steps of 2 rows."""
    notes = build_grid_overview(tmp_path, grid={"train_rows": [5, 40]}).notes
    assert "arithmetic: distillation passes 4 times over 5 rows, 0.5 times over 40 rows" in notes


def test_starts_of_other_rows_and_seeds_have_names_of_their_own(tmp_path: Path) -> None:
    student = {"layers": 1, "width": 8, "heads": 2, "init_seed": "cell", "sft": {"steps": 4}}
    overview = build_grid_overview(tmp_path, student=student, grid={"student.sft.rows": [5], "seed": [0, 1]})
    names = [artifact.name for artifact in overview.artifacts if artifact.role == "start"]
    assert names == ["arithmetic/custom, 5 rows", "arithmetic/custom, 5 rows, seed 1"]
