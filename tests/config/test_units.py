"""Units of a grid: artifacts before what reads them, each cell in one pack, ids that depend on content."""

from pathlib import Path
from typing import Any

import yaml

from gkd_lab import experiments
from gkd_lab.config import Grid
from gkd_lab.config.units import Unit, plan_units


def load_grid(folder: Path, **changes: Any) -> Grid:
    document = {
        "description": "units",
        "task": "arithmetic",
        "grid": {"lmbda": [0, 1], "beta": [0, 0.5], "seed": [0, 1]},
        "student": {"size": "small", "init_seed": 0, "sft": {"seed": 0}},
        "data": {"train": 40, "validation": 8, "test": 8},
    }
    path = folder / "units.yaml"
    path.write_text(yaml.safe_dump({**document, **changes}, sort_keys=False))
    return experiments.load(str(path), outputs=folder / "outputs")


def list_kinds(units: tuple[Unit, ...]) -> list[str]:
    return [unit.kind for unit in units]


def test_artifacts_come_before_the_packs_that_need_them(tmp_path: Path) -> None:
    grid = load_grid(tmp_path)
    units = plan_units(grid.cells, 3)
    assert list_kinds(units) == ["teacher", "start", "pack", "pack", "pack"]
    teacher, start, *packs = units
    assert all(pack.needs == (teacher.id, start.id) and pack.partial_needs == () for pack in packs)
    assert [len(pack.cells) for pack in packs] == [3, 3, 2]
    members = [cell.fingerprint for pack in packs for cell in pack.cells]
    assert sorted(members) == sorted(cell.fingerprint for cell in grid.cells)
    assert [unit.name for unit in units][:3] == [
        "arithmetic: teacher",
        "arithmetic: SFT student",
        "arithmetic: pack of 3 cells",
    ]


def test_text_and_scores_need_their_teacher_and_the_cells_need_all(tmp_path: Path) -> None:
    grid = load_grid(
        tmp_path,
        grid={"beta": [0, 0.5]},
        source={"lmbda": 0, "text": {}},
        teacher_scores="full",
    )
    teacher, start, text, scores, pack = plan_units(grid.cells, "auto")
    assert [unit.kind for unit in (teacher, start, text, scores, pack)] == [
        *("teacher", "start", "text", "scores", "pack")
    ]
    assert (text.needs, scores.needs) == ((teacher.id,), (teacher.id, text.id))
    assert set(pack.needs) == {teacher.id, start.id, text.id, scores.id}


def test_a_student_of_some_cells_is_a_partial_need(tmp_path: Path) -> None:
    grid = load_grid(tmp_path, student={"size": "small", "init_seed": "cell"})
    units = plan_units(grid.cells, "auto")
    assert list_kinds(units) == ["teacher", "start", "start", "pack"]
    assert units[-1].needs == (units[0].id,)
    assert units[-1].partial_needs == (units[1].id, units[2].id)
    alone = plan_units(grid.cells, "off")[-1]
    assert (len(alone.cells), len(alone.needs), alone.partial_needs) == (1, 2, ())


def test_ids_depend_on_content_and_pack_limit_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = load_grid(tmp_path), load_grid(tmp_path / "other")
    ids = [unit.id for unit in plan_units(first.cells, 3)]
    assert ids == [unit.id for unit in plan_units(second.cells, 3)]
    assert len(set(ids)) == len(ids)
    assert [unit.id for unit in plan_units(first.cells, 4)][:2] == ids[:2]
    assert not set(ids[2:]) & {unit.id for unit in plan_units(first.cells, 4)}
    changed = load_grid(tmp_path, steps=7)
    assert ids[:2] == [unit.id for unit in plan_units(changed.cells, 3)][:2]
    assert not set(ids[2:]) & {unit.id for unit in plan_units(changed.cells, 3)}
