"""Differences of students from their start: paired, and adjusted for their number."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gkd_lab.config import Cell, Grid
from gkd_lab.statistics.differences import adjust_holm, compute_start_differences
from gkd_lab.statistics.example_scores import build_example_lookup, find_no_examples
from gkd_lab.statistics.noise import DIFFERENCE, ScoreSample, estimate_contrast
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.scores import select_scores

from ..tables.prediction_records import write_cell_record, write_reference_record
from ..tables.synthetic_store import build_grid, fill_store


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1, never falling: .04 .06 .06 .06
    assert adjust_holm([0.02, 0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.06, 0.04, 0.06])
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def build_scores(grid: Grid, store: Store, metric: str = "accuracy") -> pd.DataFrame:
    """Build the scores of the models of a grid."""
    return select_scores(build_long_table(grid, store), metric)


def test_one_seed_is_paired_with_its_start_over_examples_and_decides_nothing(tmp_path: Path) -> None:
    grid, store = build_grid(), Store(tmp_path)
    fill_store(grid, store, score=lambda cell: 60.0 if cell.lmbda == 1 else 30.0)
    differences = compute_start_differences(build_scores(grid, store), build_example_lookup(grid, store))
    assert [d.axis_values["lmbda"] for d in differences] == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]
    assert [d.estimate.effect for d in differences] == [0.0] * 6 + [30.0] * 3
    assert {d.estimate.method for d in differences} == {"one seed: 50 examples only"}
    assert all(low is not None and low > 10 for low in (d.estimate.low() for d in differences[6:]))
    assert {(d.verdict, d.adjusted_p_value) for d in differences} == {("undecided", None)}


def test_a_single_significant_difference_may_be_undecided_among_many(tmp_path: Path) -> None:
    """Differences 2.1, 3 and 3.9: t = 3 / (0.9 / sqrt(3)) = 5.77, p = 0.029; eight others are near 0."""

    def score(cell: Cell) -> float:
        return 30.0 + (3.0 if (cell.lmbda, cell.beta) == (0, 0) else 0.1) + 0.9 * (cell.seed - 1)

    grid, store = (
        build_grid(grid={"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 1], "seed": [0, 1, 2]}),
        Store(tmp_path),
    )
    fill_store(grid, store, score=score)
    first = compute_start_differences(build_scores(grid, store), find_no_examples)[0]
    assert first.estimate.p_value == pytest.approx(0.0287, abs=1e-4)
    assert (first.verdict, first.adjusted_p_value) == ("undecided", pytest.approx(9 * 0.0287, abs=1e-3))
    alone = build_grid(grid={"lmbda": [0], "beta": [0], "seed": [0, 1, 2]})
    assert alone.cells[0].fingerprint == grid.cells[0].fingerprint
    (difference,) = compute_start_differences(build_scores(alone, store), find_no_examples)
    assert difference.verdict == "higher"


def test_several_seeds_are_tested_over_seeds_and_missing_cells_are_left_out(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]}), Store(tmp_path)
    fill_store(grid, store, cells=grid.cells[:3], score=lambda cell: 40.0 + cell.seed)
    (difference,) = compute_start_differences(build_scores(grid, store), find_no_examples)
    assert difference.estimate.effect == 11.0
    assert difference.estimate.method == "t over 3 seeds; noise of the examples not known"
    assert difference.estimate.low() == pytest.approx(11 - 2.48414, abs=1e-4)
    assert difference.verdict == "higher"


def test_seeds_that_agree_decide_nothing(tmp_path: Path) -> None:
    """Two seeds that are both one of 50 examples better: a coin that fell the same way twice."""
    grid, store = build_grid(grid={"lmbda": [0], "seed": [0, 1]}), Store(tmp_path)
    fill_store(grid, store, score=lambda cell: 32.0)
    (difference,) = compute_start_differences(build_scores(grid, store), find_no_examples)
    # standard error 2 / sqrt(2); t = 1.414 with one degree of freedom
    assert difference.estimate.p_value == pytest.approx(1 - 2 * np.arctan(2**0.5) / np.pi)
    assert difference.verdict == "undecided"


def test_seeds_and_examples_are_crossed(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0], "seed": [0, 1]}), Store(tmp_path)
    fill_store(grid, store, score=lambda cell: 60.0 + 4 * cell.seed)
    find_examples = build_example_lookup(grid, store)
    (difference,) = compute_start_differences(build_scores(grid, store), find_examples)
    keys = [cell.fingerprint for cell in (*grid.cells, grid.cells[0].training.start)]
    lists = [find_examples((str(key), "greedy", "accuracy")) for key in keys]
    first, second, start = (examples.values for examples in lists if examples is not None)
    values = np.array([[first, second], [start, start]])
    assert difference.estimate == estimate_contrast(ScoreSample(values.mean(axis=2), values), DIFFERENCE)
    assert difference.estimate.method == "2 seeds x 50 examples, crossed"
    assert difference.estimate.effect == 32.0


def test_a_corpus_score_is_paired_through_its_counts(tmp_path: Path) -> None:
    axes = {"task": ["translation"], "lmbda": [0, 1], "seed": [0, 1]}
    grid, store = build_grid(task=None, grid=axes), Store(tmp_path)
    sentence = [f"the river number {n} rose over its banks" for n in range(30)]
    wrong = [f"a {text[4:]} today" for text in sentence]
    by_lmbda = {0: wrong, 1: sentence}
    for cell in grid.cells:
        rows = list(zip(sentence, by_lmbda[int(cell.lmbda)], sentence, strict=True))
        write_cell_record(store, cell, rows)
    write_reference_record(store, grid.cells[0], "start", list(zip(sentence, wrong, sentence, strict=True)))
    scores = build_scores(grid, store, "bleu")
    same, better = compute_start_differences(scores, build_example_lookup(grid, store))
    assert (same.estimate.effect, same.verdict) == (pytest.approx(0.0), "undecided")
    assert better.estimate.examples == 30
    low = better.estimate.low()
    assert low is not None and low > 5
    assert better.verdict == "higher"
