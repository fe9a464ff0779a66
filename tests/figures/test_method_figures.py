"""What notebooks call: tables read back, the paper as a table, gains, bars, lines, the trade-off."""

import math
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gkd_lab.config import ConfigError
from gkd_lab.figures import bars, heat_map, lines, tradeoff
from gkd_lab.report.notebooks import (
    add_gain,
    combine_with_paper,
    format_verdicts,
    load_paper_table,
    read_table,
)
from gkd_lab.store import Store
from gkd_lab.tables.table import encode_table, table

from ..tables.synthetic_store import build_grid, fill_store

METHODS = {"method": ["supervised_kd", "gkd_supervised", "gkd"], "beta": [0, 0.1], "seed": [0, 1]}


def run_table(folder: Path, **document: object) -> pd.DataFrame:
    grid = build_grid(**document)
    fill_store(grid, Store(folder))
    return table(grid, Store(folder))


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def axes_of(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.axison]


def test_a_table_is_read_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = run_table(tmp_path, grid=METHODS)
    (tmp_path / "made.parquet").write_bytes(encode_table(frame, "parquet"))
    monkeypatch.setenv("GKD_LAB_TABLES", str(tmp_path))
    found = read_table("made")
    assert list(found.columns) == list(frame.columns)
    assert list(found["evaluations"]) == list(frame["evaluations"])
    collapsed = frame["stands_for"].map(lambda points: isinstance(points, list))
    assert collapsed.any()
    assert list(found.loc[collapsed, "stands_for"]) == list(frame.loc[collapsed, "stands_for"])
    assert found["accuracy"].equals(frame["accuracy"])


def test_a_missing_table_is_asked_for_by_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="gkd-lab table on_policy_share --format parquet -o tables/on_policy"
    ):
        read_table("on_policy_share")


def test_the_paper_s_heat_map_is_drawn_with_its_own_numbers_beside_ours(tmp_path: Path) -> None:
    grid = {"task": ["translation"], "lmbda": [0, 0.5, 1], "beta": [0, 0.1, 1]}
    ours = run_table(tmp_path, grid=grid)
    left, small, base = axes_of(heat_map(combine_with_paper(ours, load_paper_table("6")), "bleu"))
    assert "translation, of this run" in left.get_title(loc="left")
    assert small.get_title(loc="left") == "translation, of the paper (small)"
    assert "improvement over the SFT student (25.6)\nteacher 28.0" in texts(small)[-1]
    assert len(texts(left)) == 9 + 1
    assert len(texts(small)) == len(texts(base)) == 15 + 1


def test_a_gain_in_the_paper_is_a_score_over_its_start() -> None:
    frame = add_gain(load_paper_table("7", "A.14"), "accuracy")
    best = frame[(frame["of"] == "the paper (small)") & (frame["lmbda"] == 1) & (frame["beta"] == 0)]
    assert best["accuracy"].item() == pytest.approx(4.585 + 6.6)
    assert best["gain in accuracy"].item() == pytest.approx(6.6)


def test_a_gain_is_over_the_start_of_the_same_cell_and_unknown_without(tmp_path: Path) -> None:
    frame = run_table(tmp_path, grid={"student": ["small", "base"], "lmbda": [0, 1]})
    frame.loc[frame["role"] == "start", "accuracy"] = [30.0, math.nan]
    cells = add_gain(frame, "accuracy").set_index("student")
    cells = cells[cells["role"] == "cell"]
    assert list(cells.loc["small", "gain in accuracy"]) == list(cells.loc["small", "accuracy"] - 30)
    assert cells.loc["base", "gain in accuracy"].isna().all()
    assert list(cells.loc["small", "gain in accuracy.low"]) == list(cells.loc["small", "accuracy.low"] - 30)


def test_bars_stand_in_the_same_rows_here_and_in_the_paper(tmp_path: Path) -> None:
    """Made scores: 40.5 and 40.1 at lmbda 0, 70.5 and 70.1 at 1, over a start of 30.

    Supervised GKD with forward KL is Supervised KD, and has no bar of its own.
    """
    ours = run_table(tmp_path, grid=METHODS, lmbda=1)
    paper = load_paper_table("9", axes=["method"], students=["small"])
    left, right = axes_of(bars(add_gain(combine_with_paper(ours, paper), "accuracy"), "gain in accuracy"))
    rows = [label.get_text() for label in left.get_yticklabels()]
    assert rows[:3] == ["SeqKD", "Supervised KD", "f-distill"]
    assert rows[-2:] == ["On-policy GKD, Forward KL", "On-policy GKD, JSD(0.1)"]
    assert texts(left) == ["10.5", "10.1", "40.5", "40.1"]
    assert [rows[round(text.xy[1])] for text in left.texts] == [
        "Supervised KD",
        "Supervised GKD, JSD(0.1)",
        *rows[-2:],
    ]
    assert dict(zip([rows[round(t.xy[1])] for t in right.texts], texts(right), strict=True)) == {
        "SeqKD": "1.9",
        "Supervised KD": "2.5",
        "f-distill": "3.5",
        "Supervised GKD, Reverse KL": "3.8",
        "ImitKD": "4.2",
        "On-policy GKD, Forward KL": "6.6",
    }


def test_lines_follow_the_paper_s_order_of_methods_and_numbers_in_theirs() -> None:
    frame = load_paper_table("3", axes=["method", "train_rows"])
    (axes,) = axes_of(lines(frame, "rouge2", x_axis="train_rows", line_axis="method"))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1,000", "10,000", "50,000", "200,000"]
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}
    assert list(drawn) == ["Supervised KD", "Supervised GKD", "ImitKD", "On-policy GKD"]
    assert drawn["On-policy GKD"] == [12.40, 12.90, 13.75, 15.13]


def test_lines_refuse_several_settings_at_one_point(tmp_path: Path) -> None:
    frame = run_table(tmp_path, grid={"lmbda": [0, 1], "beta": [0, 1], "student": ["small", "base"]})
    with pytest.raises(ValueError, match="several settings at one value of 'student'"):
        lines(frame, "accuracy", x_axis="student", line_axis="beta")


def test_the_trade_off_is_drawn_from_the_warmest_to_the_coldest() -> None:
    (axes,) = axes_of(tradeoff(load_paper_table("4"), "rouge2", "self_bleu"))
    forward = next(line for line in axes.get_lines() if line.get_label() == "Forward KL")
    assert list(forward.get_xdata()) == [14.42, 43.38, 60.97, 85.00]
    assert list(forward.get_ydata()) == [10.27, 15.11, 15.91, 16.38]


@pytest.mark.parametrize(
    "draw", [lambda t: bars(t, "accuracy"), lambda t: lines(t, "accuracy", "beta", "seed")]
)
def test_a_table_without_a_score_yet_is_told(draw: object, tmp_path: Path) -> None:
    grid = build_grid(grid=METHODS)
    empty = table(grid, Store(tmp_path))
    with pytest.raises(ValueError, match="no cell has a score in 'accuracy' yet"):
        draw(empty)


def test_nothing_sampled_is_nothing_to_trade(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column sample<temperature>/rouge2"):
        tradeoff(run_table(tmp_path), "rouge2", "self_bleu")


def test_verdicts_are_those_that_the_experiment_names_with_the_paper_s_own(tmp_path: Path) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "beta": [0, 1], "seed": [0, 1]}, paper={"claims": ["C1", "C12"]})
    fill_store(grid, Store(tmp_path))
    text = "\n".join(format_verdicts(table(grid, Store(tmp_path)), grid))
    assert text.startswith("C1   holds")
    assert "The paper's own numbers: fails; 54 of 55" in text
    assert "\nC12 " in text
