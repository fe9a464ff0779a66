"""Figure of reward gains: its points, and the paper's beside them."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes

from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.config import Cell, Grid
from gkd_lab.figures import reward_gains
from gkd_lab.figures.layout import SUBTITLE
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store

RUN = {
    "grid": {"method": ["gkd", "rlef"], "alpha": [0.05, 0.5, 1], "seed": [0, 1]},
    "reward": "exact_match",
    "beta": 0.9,
    "lmbda": 1,
}


def score_cell(cell: Cell) -> float:
    return 60.0 - 10 * cell.labels["alpha"] + cell.seed if cell.labels["method"] == "gkd" else 50.0


@pytest.fixture
def rewarded_run(tmp_path: Path) -> tuple[Grid, pd.DataFrame]:
    grid = build_grid(**RUN)
    fill_store(grid, Store(tmp_path), score=score_cell)
    return grid, build_long_table(grid, Store(tmp_path))


def read_points(axes: Axes) -> dict[str, tuple[float, float]]:
    """Map each label to the coordinates of its point."""
    labels = [text for text in axes.texts if text.get_label() != SUBTITLE]
    return {text.get_text(): tuple(map(float, text.xy)) for text in labels}  # type: ignore[attr-defined]


def test_each_alpha_has_a_point_at_its_mean_gain(rewarded_run: tuple[Grid, pd.DataFrame]) -> None:
    _, frame = rewarded_run
    run_axes, _ = reward_gains(frame, "accuracy", "accuracy").axes
    start = float(frame.loc[frame["role"] == "start", "value"].iloc[0])
    drawn_points = read_points(run_axes)
    assert set(drawn_points) == {"teacher", "α = 0.05", "α = 0.5", "α = 1", "RLEF*"}
    assert drawn_points["α = 0.5"] == pytest.approx((55.5 - start, 55.5 - start))
    assert drawn_points["RLEF*"] == pytest.approx((50 - start, 50 - start))


def test_the_papers_points_are_those_of_figure_5(rewarded_run: tuple[Grid, pd.DataFrame]) -> None:
    drawn_points = read_points(reward_gains(rewarded_run[1], "accuracy", "accuracy").axes[1])
    assert drawn_points == {
        "RLEF*": (44.9, 3.17),
        "α = 0.05": (42.0, 3.56),
        "α = 0.1": (33.2, 4.06),
        "α = 0.25": (25.9, 4.63),
        "α = 0.5": (21.7, 4.72),
        "teacher": (17.3, 8.7),
    }


def test_a_table_without_a_start_is_refused(rewarded_run: tuple[Grid, pd.DataFrame]) -> None:
    frame = rewarded_run[1].copy()
    frame.loc[frame["role"] == "start", "value"] = float("nan")
    with pytest.raises(ValueError, match="accuracy"):
        reward_gains(frame, "accuracy", "accuracy")


def test_measurements_of_rewarded_cells_carry_alpha_and_anchor(
    rewarded_run: tuple[Grid, pd.DataFrame],
) -> None:
    """Their loss is another one than the divergence alone."""
    _, frame = rewarded_run
    models = load_table_scores(frame).models
    losses = {(model["loss"], model["alpha"], model["anchor"]) for model in models if model["role"] == "cell"}
    assert losses == {
        ("jsd with a reward", 0.05, None),
        ("jsd with a reward", 0.5, None),
        ("jsd", None, None),
        ("jsd with a reward", None, "start"),
    }
