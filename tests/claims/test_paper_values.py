"""The paper's numbers: complete, as printed, each with its reading error."""

from typing import Any

import pandas as pd
import pytest

from gkd_lab.claims import paper

PAPER_VALUES = paper.load_values()


def select_rows(**wanted: Any) -> pd.DataFrame:
    rows = PAPER_VALUES
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    return rows


def test_the_heat_maps_have_55_columns_of_three_lmbdas() -> None:
    maps = PAPER_VALUES[PAPER_VALUES["figure"].isin(["6", "7", "A.12", "A.13", "A.14"])]
    assert len(maps) == 3 * 55
    assert maps.groupby(["task", "student", "decoding", "beta"]).size().eq(3).all()


def test_a_printed_cell_is_as_printed_with_its_start() -> None:
    (row,) = select_rows(figure="7", student="base", lmbda=1.0, beta=0.0).to_dict("records")
    assert (row["value"], row["form"], row["start"], row["teacher"]) == (8.8, "gain", 10.16, 27.9)
    assert (row["how"], row["error"], row["gain"], row["gain_error"]) == ("printed", 0.05, 8.8, 0.05)
    (row,) = select_rows(figure="A.13", student="small", lmbda=1.0, beta=0.5).to_dict("records")
    assert (row["value"], row["gain"]) == (16.6, pytest.approx(3.2))
    assert row["gain_error"] == pytest.approx(0.1)


def test_starts_that_the_paper_does_not_state_are_null() -> None:
    assert select_rows(figure="A.12")["start"].isna().all()
    assert select_rows(figure="A.12")["gain"].isna().all()


def test_every_number_has_a_reading_method_and_error() -> None:
    assert set(PAPER_VALUES["how"]) == {
        "printed",
        "digitised from vector graphics",
        "digitised from a render",
    }
    assert (PAPER_VALUES["error"] > 0).all()
    assert set(PAPER_VALUES["figure"]) == set(paper.load_figures())
    assert set(select_rows(figure="5", metric="entailment")["error"]) == {0.1}


def test_no_number_is_listed_twice() -> None:
    read = ("value", "start", "teacher", "gain", "error", "how", "gain_error")
    assert not PAPER_VALUES.duplicated([name for name in PAPER_VALUES if name not in read]).any()


def test_baselines_are_the_heat_maps_cells() -> None:
    """Supervised KD, ImitKD and supervised GKD are cells of the grid (Figures 9 and 7, A.14)."""
    maps = PAPER_VALUES[PAPER_VALUES["figure"].isin(["7", "A.14"])].set_index(["student", "lmbda", "beta"])[
        "gain"
    ]
    places = {"supervised_kd": (0.0, 0.0), "imitkd": (0.5, 0.0), "gkd_supervised": (0.0, 1.0)}
    for method, place in places.items():
        for student in ("small", "base", "large"):
            (bar,) = select_rows(figure="9", method=method, student=student)["gain"]
            assert bar == pytest.approx(maps[(student, *place)], abs=0.1)
