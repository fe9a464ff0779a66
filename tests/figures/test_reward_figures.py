"""The figure of rewards: which points it has, where they lie, and the paper's own beside them."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes

from gkd_lab.claims.measurements import extract_measurements
from gkd_lab.config import Cell, Grid
from gkd_lab.figures import reward_gains
from gkd_lab.store import Store
from gkd_lab.tables.table import table

from ..tables.synthetic_store import build_grid, fill_store

RUN = {
    "grid": {"method": ["gkd", "rlef"], "alpha": [0.05, 0.5, 1], "seed": [0, 1]},
    "reward": "exact_match",
    "beta": 0.9,
    "lmbda": 1,
}


def score(cell: Cell) -> float:
    return 60.0 - 10 * cell.labels["alpha"] + cell.seed if cell.labels["method"] == "gkd" else 50.0


@pytest.fixture
def made(tmp_path: Path) -> tuple[Grid, pd.DataFrame]:
    grid = build_grid(**RUN)
    fill_store(grid, Store(tmp_path), score=score)
    return grid, table(grid, Store(tmp_path))


def points(axes: Axes) -> dict[str, tuple[float, float]]:
    """Label -> where it is."""
    return {text.get_text(): tuple(map(float, text.xy)) for text in axes.texts}  # type: ignore[attr-defined]


def test_a_point_is_the_mean_gain_of_an_alpha(made: tuple[Grid, pd.DataFrame]) -> None:
    _, frame = made
    ours, _ = reward_gains(frame, "accuracy", "accuracy").axes
    start = float(frame.loc[frame["role"] == "start", "accuracy"].iloc[0])
    found = points(ours)
    assert set(found) == {"teacher", "α = 0.05", "α = 0.5", "α = 1", "RLEF*"}
    assert found["α = 0.5"] == pytest.approx((55.5 - start, 55.5 - start))
    assert found["RLEF*"] == pytest.approx((50 - start, 50 - start))


def test_the_paper_s_points_are_figure_5_s(made: tuple[Grid, pd.DataFrame]) -> None:
    found = points(reward_gains(made[1], "accuracy", "accuracy").axes[1])
    assert found == {
        "RLEF*": (44.9, 3.17),
        "α = 0.05": (42.0, 3.56),
        "α = 0.1": (33.2, 4.06),
        "α = 0.25": (25.9, 4.63),
        "α = 0.5": (21.7, 4.72),
        "teacher": (17.3, 8.7),
    }


def test_without_a_start_there_is_no_gain(made: tuple[Grid, pd.DataFrame]) -> None:
    frame = made[1].copy()
    frame.loc[frame["role"] == "start", "accuracy"] = float("nan")
    with pytest.raises(ValueError, match="no accuracy or accuracy of the student as it starts"):
        reward_gains(frame, "accuracy", "accuracy")


def test_claims_know_a_cell_with_a_reward_by_its_alpha_and_its_anchor(
    made: tuple[Grid, pd.DataFrame],
) -> None:
    """And do not take it for what its divergence does alone."""
    grid, frame = made
    places = [
        fact.figure_cell
        for fact in extract_measurements(frame, {cell.fingerprint: cell for cell in grid.cells})
    ]
    found = {(p["loss"], p.get("alpha"), p.get("anchor")) for p in places if p["role"] == "cell"}
    assert found == {
        ("jsd with a reward", 0.05, None),
        ("jsd with a reward", 0.5, None),
        ("jsd", None, None),
        ("jsd with a reward", None, "start"),
    }
