"""The shipped experiment of lmbda x beta on three tasks, reduced to seconds."""

from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.report.html_report import write_report
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.tables.table import build_wide_table

TINY = "{layers: 1, width: 16, heads: 2, sft: {steps: 2, batch_size: 4, learning_rate: 1.0e-3}}"
SMALL_GRID = {
    "lmbda": "0,1",
    "beta": "0,0.5,1",
    "teacher": TINY,
    "student": TINY,
    "steps": "2",
    "batch_size": "4",
    "data.train": "40",
    "data.test": "6",
}


@pytest.mark.slow
def test_nano_grid_runs_three_tasks_to_a_table_and_a_report(tmp_path: Path) -> None:
    grid = experiments.load("nano_grid", overrides=SMALL_GRID, outputs=tmp_path)
    options = RunOptions(tmp_path)
    outcome = run_grid(grid, options)
    assert (outcome.failures, outcome.busy_cell_count) == ([], 0)
    frame = build_wide_table(grid, options.store)
    cells = frame[frame.role == "cell"]
    assert set(frame.status) == {"done"}
    assert cells.groupby("task").size().to_dict() == dict.fromkeys(grid.axes["task"], 6)
    headlines = {
        "arithmetic": "greedy/accuracy",
        "translation": "beam4/bleu",
        "summarization": "greedy/rouge2",
    }
    for task, score in headlines.items():
        assert cells[cells.task == task][score].notna().all()
    page = write_report(grid, options.store, tmp_path / "report.html").read_text()
    assert all(task in page for task in headlines)
