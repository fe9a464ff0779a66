"""Rows of `status` move while a pack trains and while its cells are evaluated, and nothing is left behind."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.runner import evaluate_cells as evaluation_module
from gkd_lab.runner.run import run_grid
from gkd_lab.status.overview import Overview, build_overview
from gkd_lab.status.render import list_cells, render_running_artifacts, render_totals
from gkd_lab.store import Store, live_progress
from gkd_lab.training.trainer import GKDTrainer

from ..runner.tiny_experiments import options, tiny_grid


def test_each_cell_of_a_pack_moves_with_each_step_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiny_grid(
        tmp_path, "arithmetic", grid={"lmbda": [0, 1]}, evaluations=[{"decoding": "greedy"}], beta=0.5
    )
    store, training_rows, texts = Store(tmp_path / "outputs"), [], []
    monkeypatch.setattr(live_progress, "WRITE_SECONDS", 0.0)

    def read_rows() -> tuple[Overview, list[dict[str, str]]]:
        overview = build_overview(grid, store, "auto")
        listing = list_cells(grid, overview, show_progress=True)
        return overview, [dict(zip(listing.columns, row, strict=True)) for row in listing.rows]

    train_step, generate = GKDTrainer.training_step, evaluation_module.generate_predictions

    def observe_step(trainer: GKDTrainer, *arguments: Any, **named: Any) -> Any:
        _, rows = read_rows()
        training_rows.append([(row["status"], row["step"], row["now"]) for row in rows])
        return train_step(trainer, *arguments, **named)

    def observe_decoding(*arguments: Any) -> Any:
        overview, rows = read_rows()
        texts.append([*(row["now"] for row in rows), *render_running_artifacts(overview)])
        return generate(*arguments)

    monkeypatch.setattr(GKDTrainer, "training_step", observe_step)
    monkeypatch.setattr(evaluation_module, "generate_predictions", observe_decoding)
    assert run_grid(grid, options(tmp_path / "outputs")).failures == []
    assert training_rows == [
        [("running", f"{step}/4", f"distillation {step}/4 steps")] * 2 for step in range(4)
    ]
    teacher, start, cells = texts
    assert teacher[:2] == ["", ""] and teacher[2].endswith(": running, greedy 0/8 rows")
    assert start[2].startswith("start ") and start[2].endswith(": running, greedy 0/8 rows")
    assert cells == ["greedy 0/8 rows"] * 2
    overview, rows = read_rows()
    assert [row["now"] for row in rows] == ["", ""]
    assert list(render_totals(overview)) == [
        "2 cells: 2 done",
        "4 evaluations: 4 done",
        "2 reference models: 2 done",
    ]
    assert not list((tmp_path / "outputs").rglob("progress.json*"))


def test_totals_count_cells_evaluations_and_models_with_the_time_left(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    cells, evaluations, models, left, *bases = render_totals(
        build_overview(grid, Store(tmp_path / "outputs"), "auto")
    )
    assert (cells, evaluations) == ("6 cells: 6 missing", "16 evaluations: 16 missing")
    assert models == "2 reference models: 2 missing"
    assert left.startswith("left to do: about ") and left.endswith(" s of imports included")
    assert any("FLOPs" in line for line in bases)
