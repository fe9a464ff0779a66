"""Differences of students from their start: paired, and adjusted for their number."""

from pathlib import Path

import pandas as pd
import pytest

from gkd_lab.config import Grid
from gkd_lab.statistics.differences import adjust_holm, compute_start_differences
from gkd_lab.store import Store
from gkd_lab.tables.example_statistics import ExampleStatistics, load_example_statistics
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.scores import select_scores

from ..tables.prediction_records import build_mean_statistics, write_cell_record, write_reference_record
from ..tables.synthetic_store import build_grid, fill_store


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1, never falling: .04 .06 .06 .06
    assert adjust_holm([0.02, 0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.06, 0.04, 0.06])
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def build_scores(grid: Grid, store: Store, metric: str = "accuracy") -> pd.DataFrame:
    """Build the scores of the models of a grid."""
    return select_scores(build_long_table(grid, store), metric)


def load_all_statistics(
    grid: Grid, store: Store, **more: ExampleStatistics
) -> dict[str, ExampleStatistics | None]:
    """Load fingerprint -> stored statistics, of all cells and their start."""
    evaluation = grid.cells[0].evaluations[0]
    start = grid.cells[0].training.start
    records = {cell.fingerprint: store.get_record(cell) for cell in grid.cells}
    records[start.fingerprint] = store.get_artifact("nano", "start", start)
    return {
        key: load_example_statistics(record, evaluation, evaluation.metrics[0])
        for key, record in records.items()
    }


def test_one_seed_is_paired_with_its_start_over_examples(tmp_path: Path) -> None:
    grid, store = build_grid(), Store(tmp_path)
    fill_store(grid, store, score=lambda cell: 60.0 if cell.lmbda == 1 else 30.0)
    differences = compute_start_differences(
        build_scores(grid, store), load_all_statistics(grid, store).__getitem__
    )
    lmbdas = [difference.axis_values["lmbda"] for difference in differences]
    assert lmbdas == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]
    assert [difference.verdict for difference in differences] == ["undecided"] * 6 + ["higher"] * 3
    assert [difference.effect.mean for difference in differences] == [0.0] * 6 + [30.0] * 3
    assert all(
        difference.effect.p is not None and difference.adjusted_p_value is not None
        for difference in differences
    )
    raised = differences[-1]
    assert raised.adjusted_p_value == pytest.approx(9 * (raised.effect.p or 0))


def test_a_single_significant_difference_may_be_undecided_among_many(tmp_path: Path) -> None:
    """A p-value of 0.03 is significant alone and not beside eight differences of 0."""
    grid, store = build_grid(), Store(tmp_path)
    start = [0.0] * 40
    better = [100.0] * 5 + [0.0] * 35
    fill_store(grid, store, score=lambda cell: 12.5 if cell == grid.cells[0] else 0.0, start_score=0.0)
    statistics = dict.fromkeys((cell.fingerprint for cell in grid.cells), build_mean_statistics(start))
    statistics[grid.cells[0].fingerprint] = build_mean_statistics(better)
    statistics[grid.cells[0].training.start.fingerprint] = build_mean_statistics(start)
    first = compute_start_differences(build_scores(grid, store), statistics.__getitem__)[0]
    assert first.effect.verdict == "higher"
    assert first.effect.p is not None and 0.01 < first.effect.p < 0.05
    assert first.verdict == "undecided"
    alone = build_grid(grid={"lmbda": [0]}, beta=0)
    assert alone.cells[0].fingerprint == grid.cells[0].fingerprint
    (difference,) = compute_start_differences(build_scores(alone, store), statistics.__getitem__)
    assert difference.verdict == "higher"


def test_several_seeds_are_tested_over_seeds_and_missing_cells_are_left_out(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]}), Store(tmp_path)
    fill_store(grid, store, cells=grid.cells[:3], score=lambda cell: 40.0 + cell.seed)
    (difference,) = compute_start_differences(build_scores(grid, store), lambda cell: None)
    assert (difference.effect.mean, difference.effect.over) == (11.0, "3 seeds, Student's t")
    assert difference.effect.low == pytest.approx(11 - 2.48414, abs=1e-4)
    assert difference.verdict == "higher"


def test_a_corpus_score_of_one_seed_is_paired_through_its_counts(tmp_path: Path) -> None:
    grid, store = build_grid(task=None, grid={"task": ["translation"], "lmbda": [0, 1]}), Store(tmp_path)
    sentence = [f"the river number {n} rose over its banks" for n in range(30)]
    wrong = [f"a {text[4:]} today" for text in sentence]
    by_lmbda = {0: wrong, 1: sentence}
    for cell in grid.cells:
        rows = list(zip(sentence, by_lmbda[int(cell.lmbda)], sentence, strict=True))
        write_cell_record(store, cell, rows)
    write_reference_record(store, grid.cells[0], "start", list(zip(sentence, wrong, sentence, strict=True)))
    statistics = load_all_statistics(grid, store)
    scores = build_scores(grid, store, "bleu")
    same, better = compute_start_differences(scores, statistics.__getitem__)
    assert (same.effect.mean, same.verdict) == (0.0, "undecided")
    assert better.effect.low is not None and better.effect.low > 5
    assert better.verdict == "higher"
