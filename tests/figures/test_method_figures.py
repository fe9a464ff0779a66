"""Functions of the notebooks: tables, the paper's numbers, gains, bars, lines, the trade-off, verdicts."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gkd_lab.config import ConfigError
from gkd_lab.figures import bars, heat_map, lines, tradeoff
from gkd_lab.figures.layout import SUBTITLE
from gkd_lab.report.notebooks import (
    add_gain,
    combine_with_paper,
    format_verdicts,
    load_paper_table,
    read_table,
)
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.table import encode_table

from ..tables.synthetic_store import build_grid, fill_store, linear_score

METHODS = {"method": ["supervised_kd", "gkd_supervised", "gkd"], "beta": [0, 0.1], "seed": [0, 1]}


def build_run_table(folder: Path, **document: object) -> pd.DataFrame:
    """Build the table of a finished synthetic grid."""
    grid = build_grid(**document)
    fill_store(grid, Store(folder))
    return build_long_table(grid, Store(folder))


def blank_scores(table: pd.DataFrame, chosen: "pd.Series[bool]") -> None:
    """Make the scores of the chosen cells missing, in place."""
    table.loc[chosen & (table["role"] == "cell"), ["value", "low", "high"]] = math.nan


def list_texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in list_labels(axes)]


def list_labels(axes: Axes) -> list[Any]:
    """Return the texts of a panel but the small lines above it."""
    return [text for text in axes.texts if text.get_label() != SUBTITLE]


def read_subtitle(axes: Axes) -> str:
    """Return the small lines above a panel in one."""
    return " ".join(text.get_text() for text in axes.texts if text.get_label() == SUBTITLE).replace("\n", " ")


def list_panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]


def test_a_parquet_table_is_read_back_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = build_run_table(tmp_path, grid=METHODS)
    (tmp_path / "made.parquet").write_bytes(encode_table(frame, "parquet"))
    monkeypatch.setenv("GKD_LAB_TABLES", str(tmp_path))
    assert frame["stands_for"].map(lambda points: isinstance(points, list)).any()
    pd.testing.assert_frame_equal(read_table("made"), frame)


def test_a_missing_table_is_refused_with_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gkd-lab table on_policy_share"):
        read_table("on_policy_share")


def test_the_papers_heat_map_is_drawn_beside_the_runs(tmp_path: Path) -> None:
    grid = {"task": ["translation"], "lmbda": [0, 0.5, 1], "beta": [0, 0.1, 1]}
    run = build_run_table(tmp_path, grid=grid)
    left, small, base = list_panels(heat_map(combine_with_paper(run, load_paper_table("6")), "bleu"))
    assert [" ".join(axes.get_title(loc="left").split()) for axes in (left, small, base)] == [
        "translation, student small, teacher teacher, of this run",
        "translation, student small, teacher xl, of the paper",
        "translation, student base, teacher xl, of the paper",
    ]
    assert all(text in read_subtitle(small) for text in ("SFT student (25.6)", "teacher 28.0"))
    assert len(list_texts(left)) == 9
    assert len(list_texts(small)) == len(list_texts(base)) == 15


def test_a_gain_of_the_paper_is_a_score_minus_its_start() -> None:
    frame = add_gain(load_paper_table("7", "A.14"), "accuracy")
    best = frame[(frame["student"] == "small") & (frame["lmbda"] == 1) & (frame["beta"] == 0)]
    values = best.set_index("metric")["value"]
    assert values.to_dict() == pytest.approx({"accuracy": 4.585 + 6.6, "gain in accuracy": 6.6})


def test_a_gain_is_over_the_cells_own_start_and_null_where_that_is_missing(tmp_path: Path) -> None:
    frame = build_run_table(tmp_path, grid={"student": ["small", "base"], "lmbda": [0, 1]})
    is_start = (frame["role"] == "start") & (frame["metric"] == "accuracy")
    frame.loc[is_start, "value"] = [30.0, math.nan]
    rows = add_gain(frame, "accuracy")
    cells = rows[rows["role"] == "cell"].set_index(["metric", "student"])
    scores, gains = (cells.loc[(name, "small")] for name in ("accuracy", "gain in accuracy"))
    for name in ("value", "low", "high"):
        assert list(gains[name]) == list(scores[name] - 30)
    assert cells.loc[("gain in accuracy", "base"), "value"].isna().all()
    assert not cells.loc[("accuracy", "base"), "value"].isna().any()


def test_the_panels_of_run_and_paper_have_the_same_rows(tmp_path: Path) -> None:
    """Made scores: 40.5 and 40.1 at lmbda 0, 70.5 and 70.1 at 1, over a start of 30.

    Supervised GKD with forward KL is Supervised KD, and has no bar of its own.
    """
    run = build_run_table(tmp_path, grid=METHODS, lmbda=1)
    paper = load_paper_table("9", axes=["method"], students=["small"])
    left, right = list_panels(bars(add_gain(combine_with_paper(run, paper), "accuracy"), "gain in accuracy"))
    rows = [label.get_text() for label in left.get_yticklabels()]
    assert rows[:3] == ["SeqKD", "Supervised KD", "f-distill"]
    assert rows[-2:] == ["On-policy GKD, Forward KL", "On-policy GKD, JSD(0.1)"]
    assert list_texts(left) == ["10.5", "10.1", "40.5", "40.1"]
    assert [rows[round(text.xy[1])] for text in list_labels(left)] == [
        "Supervised KD",
        "Supervised GKD, JSD(0.1)",
        *rows[-2:],
    ]
    assert dict(zip([rows[round(t.xy[1])] for t in list_labels(right)], list_texts(right), strict=True)) == {
        "SeqKD": "1.9",
        "Supervised KD": "2.5",
        "f-distill": "3.5",
        "Supervised GKD, Reverse KL": "3.8",
        "ImitKD": "4.2",
        "On-policy GKD, Forward KL": "6.6",
    }


def test_lines_are_ordered_by_method_and_ticks_by_number() -> None:
    frame = load_paper_table("3", axes=["method", "train_rows"])
    (axes,) = list_panels(lines(frame, "rouge2", x_axis="train_rows", line_axis="method"))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1,000", "10,000", "50,000", "200,000"]
    drawn_lines = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}
    assert list(drawn_lines) == ["Supervised KD", "Supervised GKD", "ImitKD", "On-policy GKD"]
    assert drawn_lines["On-policy GKD"] == [12.40, 12.90, 13.75, 15.13]


def test_a_point_without_a_score_is_a_gap_in_its_line_and_keeps_its_place(tmp_path: Path) -> None:
    """No line has a score at lmbda 0.25; `base` has one at 1 alone."""
    table = build_run_table(tmp_path, grid={"lmbda": [0, 0.25, 0.5, 1], "student": ["small", "base"]})
    blank_scores(table, (table["lmbda"] == 0.25) | ((table["student"] == "base") & (table["lmbda"] < 1)))
    (axes,) = list_panels(lines(table, "accuracy", "lmbda", "student"))
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn == {
        "student small": pytest.approx([38, math.nan, 53, 68], nan_ok=True),
        "student base": pytest.approx([math.nan, math.nan, math.nan, 68], nan_ok=True),
    }
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.25", "0.5", "1"]


def test_a_line_without_any_score_is_not_drawn(tmp_path: Path) -> None:
    table = build_run_table(tmp_path, grid={"lmbda": [0, 1], "student": ["small", "base"]})
    blank_scores(table, (table["student"] == "base") | (table["lmbda"] == 1))
    (axes,) = list_panels(lines(table, "accuracy", "student", "lmbda"))
    (line,) = [line for line in axes.get_lines() if line.get_label() != "SFT student"]
    assert line.get_label() == "λ = 0"
    assert np.isnan(np.asarray(line.get_ydata())).tolist() == [False, True]


def test_lines_of_run_and_paper_go_on_between_their_own_points(tmp_path: Path) -> None:
    """The paper has no cells at the run's rows, nor the run at the paper's; the run's second is missing."""
    grid = {"method": ["supervised_kd", "imitkd"], "train_rows": [5, 10, 20]}
    run = build_run_table(tmp_path, grid=grid, lmbda=1, beta=0)
    blank_scores(run, run["train_rows"] == 10)
    combined = combine_with_paper(run, load_paper_table("3", axes=["method", "train_rows"]))
    table = combined[combined["metric"].isin(["accuracy", "rouge2"])].assign(metric="score")
    left, right = list_panels(lines(table, "score", "train_rows", "method"))
    drawn = {
        str(line.get_label()): np.isnan(np.asarray(line.get_ydata())).tolist() for line in left.get_lines()
    }
    assert drawn == {"Supervised KD": [False, True, False], "ImitKD": [False, True, False]}
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in right.get_lines()}
    assert drawn["On-policy GKD"] == [12.40, 12.90, 13.75, 15.13]


def test_a_line_goes_on_where_it_has_no_cell(tmp_path: Path) -> None:
    """The table has no cell of ImitKD at 10 rows, and one of Supervised KD that has no score."""
    grid = {"method": ["supervised_kd", "imitkd"], "train_rows": [5, 10, 20]}
    table = build_run_table(tmp_path, grid=grid)
    blank_scores(table, table["train_rows"] == 10)
    table = table[(table["method"] != "imitkd") | table["value"].notna()]
    (axes,) = list_panels(lines(table, "accuracy", "train_rows", "method"))
    drawn = {
        str(line.get_label()): np.isnan(np.asarray(line.get_ydata())).tolist() for line in axes.get_lines()
    }
    assert drawn == {"Supervised KD": [False, True, False], "ImitKD": [False, False]}


def test_a_bar_without_a_score_is_called_missing_and_a_method_that_a_panel_has_not_is_empty(
    tmp_path: Path,
) -> None:
    grid, store = build_grid(grid=METHODS, lmbda=1), Store(tmp_path)
    fill_store(
        grid, store, cells=[cell for cell in grid.cells if cell.beta == 0]
    )  # JSD(0.1) has the last row
    run = build_long_table(grid, store)
    paper = load_paper_table("9", axes=["method"], students=["small"])
    table = add_gain(combine_with_paper(run, paper), "accuracy")
    left, right = list_panels(bars(table, "gain in accuracy"))
    rows = [label.get_text() for label in left.get_yticklabels()]
    texts = {rows[round(text.xy[1])]: text.get_text() for text in list_labels(left)}
    assert texts == {
        "Supervised KD": "10.5",
        "Supervised GKD, JSD(0.1)": "missing",
        "On-policy GKD, Forward KL": "40.5",
        "On-policy GKD, JSD(0.1)": "missing",
    }
    assert "missing" not in list_texts(right)
    assert len(rows) == len(set(rows)) > len(texts)
    below, above = sorted(left.get_ylim())
    assert all(
        below < round(text.xy[1]) - 0.3 and round(text.xy[1]) + 0.3 < above for text in list_labels(left)
    )


def test_lines_refuse_several_settings_at_one_point(tmp_path: Path) -> None:
    frame = build_run_table(tmp_path, grid={"lmbda": [0, 1], "beta": [0, 1], "student": ["small", "base"]})
    with pytest.raises(ValueError, match="student"):
        lines(frame, "accuracy", x_axis="student", line_axis="beta")


def test_the_tradeoff_is_drawn_from_the_highest_to_the_lowest_temperature() -> None:
    (axes,) = list_panels(tradeoff(load_paper_table("4"), "rouge2", "self_bleu"))
    forward = next(line for line in axes.get_lines() if line.get_label() == "Forward KL")
    assert list(forward.get_xdata()) == [14.42, 43.38, 60.97, 85.00]
    assert list(forward.get_ydata()) == [10.27, 15.11, 15.91, 16.38]


@pytest.mark.parametrize(
    "draw", [lambda t: bars(t, "accuracy"), lambda t: lines(t, "accuracy", "beta", "seed")]
)
def test_a_table_without_scores_is_refused(draw: object, tmp_path: Path) -> None:
    grid = build_grid(grid=METHODS)
    empty = build_long_table(grid, Store(tmp_path))
    with pytest.raises(ValueError, match="accuracy"):
        draw(empty)


def test_a_table_without_sampled_scores_has_no_tradeoff(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samples.*'rouge2'.*greedy/accuracy"):
        tradeoff(build_run_table(tmp_path), "rouge2", "self_bleu")


def test_verdicts_of_the_experiments_claims_stand_beside_the_papers(tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "beta": [0, 1], "seed": [0, 1]}, paper={"claims": ["C1", "C12"]})
    noise = random.Random(0)
    fill_store(grid, Store(tmp_path), score=lambda cell: linear_score(cell) + 0.1 * noise.random())
    text = "\n".join(format_verdicts(build_long_table(grid, Store(tmp_path)), grid))
    assert text.startswith("C1   holds")
    assert "fails; 54 of 55" in text
    assert "\nC12 " in text


def test_sft_students_that_differ_along_the_axis_are_a_dashed_line(tmp_path: Path) -> None:
    """One start for each number of rows and seed: 30 for seed 0, 34 for seed 1."""
    student = {"layers": 1, "width": 8, "heads": 2, "init_seed": "cell", "sft": {"steps": 4}}
    axes = {"student.sft.rows": [20, 5, 10], "lmbda": [0, 1], "seed": [0, 1]}
    table = build_run_table(tmp_path, student=student, grid=axes)
    table.loc[(table["role"] == "start") & (table["seed"] == 1), "value"] = 34.0
    figure = lines(table, "accuracy", x_axis="student.sft.rows", line_axis="lmbda")
    drawn = {str(line.get_label()): line for line in list_panels(figure)[0].get_lines()}
    assert list(drawn["SFT student"].get_ydata()) == [32.0, 32.0, 32.0]
    assert {"λ = 0", "λ = 1"} < set(drawn)
    assert [label.get_text() for label in list_panels(figure)[0].get_xticklabels()] == ["5", "10", "20"]
    one_start = build_run_table(tmp_path / "one", grid={"train_rows": [5, 10], "lmbda": [0, 1]})
    figure = lines(one_start, "accuracy", x_axis="train_rows", line_axis="lmbda")
    assert "SFT student" not in {str(line.get_label()) for line in list_panels(figure)[0].get_lines()}
