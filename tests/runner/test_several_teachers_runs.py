"""Experiments with several teachers: training, resuming, and rows that are routed to one of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store

from .tiny_experiments import contents, options, table_of, tiny_grid

GREEDY: dict[str, Any] = {"evaluations": [{"decoding": "greedy"}]}
SMALL = {"layers": 1, "width": 12, "heads": 2, "sft": {"steps": 4}}
MIXTURE = [{"beta": 0.5, "teacher": ["teacher", "small"], "mixture": [0.7, 0.3]}]
SUM = [{"beta": 0.5}, {"beta": 0.5, "teacher": "small", "weight": 0.5}]
ANCHORED = [{"beta": 0.5}, {"beta": 0.5, "teacher": "start", "weight": 0.1}]


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_cells_train_on_several_teachers(task: str, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    histories = []
    for name, listed, extra_teachers in (
        ("mixture", MIXTURE, {"small": SMALL}),
        ("sum", SUM, {"small": SMALL}),
        ("anchored", ANCHORED, None),
    ):
        grid = tiny_grid(
            tmp_path, task, name, grid={"lmbda": [0, 1]}, objectives=listed, teachers=extra_teachers, **GREEDY
        )
        assert run_grid(grid, options(outputs)).failures == []
        rows = [row for row in table_of(grid, outputs) if row["role"] == "cell"]
        assert [row["status"] for row in rows] == ["done"] * 2
        histories.append(Store(outputs).get_record(grid.cells[0]).read_history())
    assert histories[0] != histories[1] != histories[2]
    assert len(list(outputs.glob("nano/*/teacher-*"))) == 2


def test_packed_and_unpacked_cells_are_equal(tmp_path: Path) -> None:
    histories = []
    for pack in ("auto", "off"):
        grid = tiny_grid(
            tmp_path / str(pack),
            "arithmetic",
            grid={"seed": [0, 1, 2]},
            objectives=MIXTURE,
            teachers={"small": SMALL},
            precision="fp64",
            **GREEDY,
        )
        outputs = tmp_path / str(pack) / "outputs"
        assert run_grid(grid, options(outputs, pack=pack)).failures == []
        histories.append([Store(outputs).get_record(cell).read_history() for cell in grid.cells])
    for cell, other_cell in zip(*histories, strict=True):
        for row, twin in zip(cell, other_cell, strict=True):
            assert row["loss"] == pytest.approx(twin["loss"], rel=1e-9)


def write_routed_data(folder: Path, teachers: list[str | None]) -> str:
    """Write arithmetic rows in GSM8K's form, each with the name of a teacher."""
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 8), ("test", 8)):
        rows = []
        for n in range(count):
            row = {"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
            teacher = teachers[n % len(teachers)]
            rows.append(row if teacher is None else {**row, "teacher": teacher})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def build_routed_grid(tmp_path: Path, teachers: list[str | None]) -> Any:
    return tiny_grid(
        tmp_path,
        "arithmetic",
        grid={"lmbda": [0, 0.5, 1]},
        objectives=[{"beta": 0.5, "teacher": ["teacher", "small"], "routed": True}],
        teachers={"small": SMALL},
        data={"source": write_routed_data(tmp_path / "data", teachers)},
        **GREEDY,
    )


def test_each_row_is_routed_to_the_teacher_that_the_data_names(tmp_path: Path) -> None:
    mixed_grid = build_routed_grid(tmp_path / "both", ["teacher", "small", "teacher"])
    assert run_grid(mixed_grid, options(tmp_path / "both" / "outputs")).failures == []
    # If all rows name the same teacher, the cell equals one with that teacher alone.
    first = build_routed_grid(tmp_path / "first", ["teacher"])
    outputs = tmp_path / "first" / "outputs"
    assert run_grid(first, options(outputs)).failures == []
    plain = tiny_grid(
        tmp_path / "first",
        "arithmetic",
        "plain",
        grid={"lmbda": [0, 0.5, 1], "beta": [0.5]},
        data={"source": str(tmp_path / "first" / "data")},
        **GREEDY,
    )
    assert run_grid(plain, options(outputs)).failures == []
    for cell, other_cell in zip(first.cells, plain.cells, strict=True):
        losses = [
            [row["loss"] for row in Store(outputs).get_record(c).read_history()] for c in (cell, other_cell)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ([None], "names no teacher"),
        (["teacher", "smol"], "teacher 'smol'"),
    ],
)
def test_row_without_a_known_teacher_is_refused(
    teachers: list[str | None], message: str, tmp_path: Path
) -> None:
    (line, *_) = run_grid(
        build_routed_grid(tmp_path / "one", teachers), options(tmp_path / "one" / "outputs")
    ).failures
    assert message in line


def test_second_run_changes_nothing(tmp_path: Path) -> None:
    grid = tiny_grid(
        tmp_path, "arithmetic", grid={"seed": [0]}, objectives=MIXTURE, teachers={"small": SMALL}, **GREEDY
    )
    outputs = tmp_path / "outputs"
    run_grid(grid, options(outputs))
    before = contents(outputs)
    assert run_grid(grid, options(outputs)).failures == []
    assert contents(outputs) == before


def test_teachers_have_the_dtype_and_device_of_the_experiment(tmp_path: Path) -> None:
    losses = {}
    for name, held in (("plain", {}), ("lowered", {"dtype": "bfloat16"}), ("parked", {"parked": True})):
        grid = tiny_grid(
            tmp_path,
            "arithmetic",
            name,
            grid={"seed": [0]},
            objectives=MIXTURE,
            teachers={"small": {**SMALL, **held}},
            **GREEDY,
        )
        # One cell with `plain`, so that it runs in a folder of its own.
        outputs = tmp_path / ("parked" if name == "parked" else "outputs")
        assert run_grid(grid, options(outputs)).failures == []
        losses[name] = [row["loss"] for row in Store(outputs).get_record(grid.cells[0]).read_history()]
    assert losses["parked"] == losses["plain"]
    assert losses["lowered"] != losses["plain"]
    assert losses["lowered"] == pytest.approx(losses["plain"], rel=0.02)
    # What is held otherwise is the same teacher.
    assert len(list((tmp_path / "outputs").glob("nano/*/teacher-*"))) == 2
