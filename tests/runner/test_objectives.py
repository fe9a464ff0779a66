"""Baselines as cells of a run: Sequence KD on text that the teacher writes once, SFT, mixed losses."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.runner import train_cells
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.teacher_text import TEXTS_FILE
from gkd_lab.store import Store

from .tiny_experiments import contents, options, table_of, tiny_grid

GREEDY: dict[str, Any] = {"evaluations": [{"decoding": "greedy"}]}


@pytest.fixture(scope="module", autouse=True)
def silence() -> None:
    silence_libraries()


def texts(outputs: Path) -> list[dict[str, Any]]:
    (file,) = outputs.glob(f"nano/*/text-sample-*/{TEXTS_FILE}")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_the_teacher_writes_once_and_students_learn_its_text(task: str, tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, task, grid={"method": ["seqkd", "sft"], "seed": [0, 1]}, **GREEDY)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    rows = [row for row in table_of(grid, outputs) if row["role"] == "cell"]
    assert [row["status"] for row in rows] == ["done"] * 4
    written = texts(outputs)
    assert len(written) == 40
    for line in written:
        assert 1 <= len(line["ids"]) <= 10
        assert line["ended"] == (line["ids"][-1] == 1)
    histories = {cell.labels["method"]: Store(outputs).get_record(cell).read_history() for cell in grid.cells}
    assert histories["seqkd"] != histories["sft"]
    assert all(row["on_policy"] == 0 for row in histories["seqkd"])


def test_a_second_run_writes_nothing_again(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"method": ["seqkd"]}, **GREEDY)
    outputs = tmp_path / "outputs"
    run_grid(grid, options(outputs))
    before = contents(outputs)
    (folder,) = outputs.glob("nano/*/text-*")
    stamp = (folder / TEXTS_FILE).stat().st_mtime_ns
    more = tiny_grid(tmp_path, "arithmetic", grid={"method": ["seqkd"], "seed": [0, 1]}, **GREEDY)
    assert run_grid(more, options(outputs)).failures == []
    assert (folder / TEXTS_FILE).stat().st_mtime_ns == stamp
    assert before.items() <= contents(outputs).items()


def test_what_a_teacher_writes_does_not_depend_on_how_rows_are_batched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rows_at_once in (256, 7):
        monkeypatch.setattr("gkd_lab.runner.teacher_text.BATCH_ROWS", rows_at_once)
        folder = tmp_path / str(rows_at_once)
        run_grid(
            tiny_grid(folder, "arithmetic", grid={"method": ["seqkd"]}, **GREEDY), options(folder / "outputs")
        )
        found.append(texts(folder / "outputs"))
    assert found[0] == found[1]


def test_terms_of_a_mixed_loss_are_in_the_history(tmp_path: Path) -> None:
    listed = [{"beta": 0.5}, {"type": "cross_entropy", "weight": 0.5}]
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0, 0.5]}, objectives=listed, **GREEDY)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    for cell in grid.cells:
        for row in Store(outputs).get_record(cell).read_history():
            assert row["loss"] == pytest.approx(row["loss/divergence"] + row["loss/cross_entropy"], rel=1e-5)


def test_only_the_first_rows_are_distilled_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    taken = train_cells.build_trainer

    def watched(pack: Any, teacher: Any, found: list[Any], *rest: Any) -> Any:
        seen.append(len(found))
        return taken(pack, teacher, found, *rest)

    monkeypatch.setattr(train_cells, "build_trainer", watched)
    grid = tiny_grid(tmp_path, "arithmetic", grid={"train_rows": [8, 40]}, **GREEDY)
    assert run_grid(grid, options(tmp_path / "outputs")).failures == []
    assert sorted(set(seen)) == [8, 40]


def test_a_text_that_lost_lines_is_written_again(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"method": ["seqkd"]}, **GREEDY)
    outputs = tmp_path / "outputs"
    run_grid(grid, options(outputs))
    (file,) = outputs.glob(f"nano/*/text-*/{TEXTS_FILE}")
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    more = tiny_grid(tmp_path, "arithmetic", grid={"method": ["seqkd"], "seed": [1]}, **GREEDY)
    assert run_grid(more, options(outputs)).failures == []
    assert file.read_text() == whole
