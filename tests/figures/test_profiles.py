"""Figures over all tasks: one row, or one line, a method."""

from pathlib import Path

import numpy as np
import pytest

from gkd_lab.figures import interquartile_means, profiles
from gkd_lab.figures.layout import SUBTITLE
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store

TWO_TASKS = {"task": ["arithmetic", "translation"], "lmbda": [0, 1], "beta": [0, 1], "seed": [0, 1]}


def test_each_method_has_its_mean_and_interval_in_words_and_a_profile(tmp_path: Path) -> None:
    grid, store = build_grid(task=None, grid=TWO_TASKS), Store(tmp_path)
    fill_store(grid, store, score=lambda cell: 30 + 6 * cell.seed + 30 * cell.lmbda, teacher_score=90.0)
    table = build_long_table(grid, store)
    (axes,) = interquartile_means(table).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"λ = {lmbda}, {name}" for lmbda in (0, 1) for name in ("Forward KL", "Reverse KL")]
    texts = [text.get_text() for text in axes.texts if text.get_label() != SUBTITLE]
    assert [text.split(" [")[0] for text in texts] == ["0.05", "0.05", "0.55", "0.55"]
    assert all("," in text for text in texts)
    panels = profiles(table).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["λ = 0", "λ = 1"]
    x, share = panels[1].lines[0].get_data()
    # scores 0.5 and 0.6 in each task
    assert np.interp([0.4, 0.55, 0.7], x, share).tolist() == [1.0, 0.5, 0.0]


def test_a_grid_without_scores_has_no_such_figure(tmp_path: Path) -> None:
    table = build_long_table(build_grid(), Store(tmp_path))
    with pytest.raises(ValueError, match="no method has a score in all tasks"):
        profiles(table)


def test_a_refusal_counts_the_missing_scores_and_names_the_first_three(tmp_path: Path) -> None:
    """Each lmbda has a learning rate of its own, so that each method lacks all settings but one."""
    grid, store = (
        build_grid(grid={"lmbda": [0, 0.25, 0.5, 1], "learning_rate": [1, 2, 3, 4]}),
        Store(tmp_path),
    )
    rates = {0: 1, 0.25: 2, 0.5: 3, 1: 4}
    done = [cell for cell in grid.cells if cell.training.optimizer.learning_rate == rates[cell.lmbda]]
    fill_store(grid, store, cells=done, score=lambda cell: 30 + 30 * cell.lmbda, teacher_score=90.0)
    for draw in (interquartile_means, profiles):
        with pytest.raises(ValueError, match=r"missing scores \(12\), the first: λ = 0") as caught:
            draw(build_long_table(grid, store))
        assert str(caught.value).count("; ") == 2
        assert len(str(caught.value)) < 300
