"""Per-example scores: their mean is the stored score, their variance that of the bootstrap."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from gkd_lab import experiments
from gkd_lab.cli import app
from gkd_lab.config import Cell, ConfigError, Grid
from gkd_lab.metrics import METRICS, MetricInput, score
from gkd_lab.metrics.intervals import draw_resample_counts
from gkd_lab.store import Store
from gkd_lab.tables.example_statistics import (
    ExampleStatistics,
    build_example_statistics,
    compute_pseudo_values,
)
from gkd_lab.tables.examples import build_examples, read_examples, write_examples
from gkd_lab.tables.long_table import build_long_table

from .prediction_records import (
    PredictionRows,
    get_predictions_path,
    write_cell_record,
    write_predictions,
    write_reference_record,
)
from .synthetic_store import build_grid

KEYS = ["cell", "evaluation", "metric"]


def make_predictions(count: int, seed: int) -> PredictionRows:
    """Return sentences with an answer, some words of which are replaced."""
    rows = []
    generator = np.random.default_rng(seed)
    for number in range(count):
        numbers = np.random.default_rng(number).integers(0, 40, size=12)
        words = ["####", str(number % 5), *(f"w{word}" for word in numbers)]
        kept = [word if generator.random() < 0.8 else "other" for word in words]
        rows.append((f"p{number}", " ".join(kept[: len(kept) - number % 3]), " ".join(words)))
    return rows


def fill_predictions(grid: Grid, store: Store, count: int = 40) -> None:
    """Write predictions of all cells and reference models."""
    for number, cell in enumerate(grid.cells):
        write_cell_record(store, cell, make_predictions(count, number))
    for number, role in enumerate(("start", "teacher"), len(grid.cells)):
        write_reference_record(store, grid.cells[0], role, make_predictions(count, number))


def assert_means_are_stored_scores(grid: Grid, store: Store, examples: pd.DataFrame, abs_: float) -> None:
    """Assert that every requested score of the table is the mean of its examples' values."""
    long = build_long_table(grid, store)
    stored = long[long["origin"] == "requested"].set_index(KEYS)["value"]
    means = examples.groupby(KEYS, sort=False)["value"].mean()
    assert list(means.index) == list(stored.index)
    assert means.tolist() == pytest.approx(stored.tolist(), abs=abs_)
    assert len(set(stored.round(6))) > 1


@pytest.mark.parametrize(
    "metrics", [["accuracy", "exact_match"], ["rouge2", "rougeL"], ["bleu", "chrf"], ["rouge1", "bleu"]]
)
def test_the_mean_value_is_the_stored_score(metrics: list[str], tmp_path: Path) -> None:
    grid = build_grid(evaluations=[{"decoding": "greedy", "metrics": metrics}], grid={"seed": [0, 1, 2]})
    store = Store(tmp_path)
    fill_predictions(grid, store)
    examples = build_examples(grid, store)
    assert len(examples) == 5 * len(metrics) * 40
    assert list(examples["example"][:41]) == [*range(40), 0]
    assert_means_are_stored_scores(grid, store, examples, 1e-9)
    write_examples(examples, tmp_path / "made.examples.parquet")
    back = read_examples(tmp_path / "made.examples.parquet")
    assert_means_are_stored_scores(grid, store, back, 1e-5)
    assert back["statistics"].notna().tolist() == examples["metric"].isin(["bleu", "chrf"]).tolist()
    for metric, group in back[back["statistics"].notna()].groupby("metric"):
        assert set(map(len, group["statistics"])) == {10 if metric == "bleu" else 18}
    types = {name: str(back[name].dtype) for name in ("cell", "example", "value")}
    assert types == {"cell": "str", "example": "int32", "value": "float64"}


def test_summed_statistics_give_the_corpus_score_of_any_selection(tmp_path: Path) -> None:
    grid = build_grid(task="translation", grid={"seed": [0]})
    store = Store(tmp_path)
    fill_predictions(grid, store)
    examples = build_examples(grid, store)
    rows = make_predictions(40, 0)[:7]
    texts, references = [row[1] for row in rows], [[row[2]] for row in rows]
    corpus = METRICS["bleu"].compute_statistics(MetricInput(texts, references))  # type: ignore[misc]
    cell = examples[examples["cell"] == grid.cells[0].fingerprint]
    summed = np.sum(cell["statistics"][:7].tolist(), axis=0)
    assert corpus.compute_score(summed.tolist()) == pytest.approx(score("bleu", texts, references).value)


def test_samples_of_a_prompt_are_one_example(tmp_path: Path) -> None:
    metrics = ["bleu", "rouge2", "self_bleu"]
    evaluation = {"decoding": "sample", "temperature": 1.0, "samples": 4, "metrics": metrics}
    grid, store = build_grid(evaluations=[evaluation], grid={"seed": [0]}), Store(tmp_path)
    rows = [(f"p{number // 4}", *row[1:]) for number, row in enumerate(make_predictions(24, 3))]
    record = store.get_record(grid.cells[0])
    write_predictions(record, grid.cells[0].evaluations[0], rows, samples=4)  # type: ignore[arg-type]
    record.finish()
    examples = build_examples(grid, store)
    assert examples.groupby("metric").size().to_dict() == {"bleu": 6, "rouge2": 6, "self_bleu": 6}
    scores = record.get_evaluation(grid.cells[0].evaluations[0]).read_scores()
    for metric, mean in examples.groupby("metric")["value"].mean().items():
        assert mean == pytest.approx(scores[str(metric)]["value"], abs=1e-9)


@pytest.mark.parametrize("metric", ["bleu", "chrf", "f1_macro", "pearson"])
def test_the_jackknife_variance_of_a_corpus_score_is_near_the_bootstraps(metric: str) -> None:
    statistics = make_corpus_statistics(metric)
    jackknife = compute_pseudo_values(statistics).std(ddof=1) / len(statistics) ** 0.5
    assert statistics.corpus_score is not None
    counts = np.concatenate(list(draw_resample_counts(400, resamples=1000, seed=0)))
    bootstrap = np.std([statistics.corpus_score(row) for row in (counts @ statistics.statistics).tolist()])
    assert (jackknife / bootstrap) ** 2 == pytest.approx(1, abs=0.1)


def make_corpus_statistics(metric: str) -> ExampleStatistics:
    """Return the statistics of 400 texts, labels or numbers."""
    generator = random.Random(0)
    rows = [{"prediction": text, "references": [truth]} for _, text, truth in make_predictions(400, 0)]
    for row in rows if metric in ("f1_macro", "pearson") else ():
        true = generator.randint(0, 3)
        row |= {"prediction": str(generator.choice([true, true, 1])), "references": [str(true)]}
    return build_example_statistics(metric, rows, [0.0] * len(rows))


def test_a_score_that_its_predictions_do_not_give_has_no_rows(tmp_path: Path) -> None:
    grid, store = build_grid(evaluations=[{"decoding": "greedy", "metrics": ["rouge2"]}]), Store(tmp_path)
    fill_predictions(grid, store)

    def shorten(cell: Cell, lines: int | None) -> None:
        path = get_predictions_path(store.get_record(cell), cell)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))

    shorten(grid.cells[0], -1)
    shorten(grid.cells[1], 0)
    store.get_record(grid.cells[2]).get_evaluation(grid.cells[2].evaluations[0]).status_file.unlink()
    left_out = [cell.fingerprint for cell in grid.cells[:3]]
    examples = build_examples(grid, store)
    assert examples["cell"].nunique() == len(grid.cells) + 2 - 3
    assert not examples["cell"].isin(left_out).any()


def test_an_empty_store_gives_an_empty_frame_of_the_same_columns(tmp_path: Path) -> None:
    examples = build_examples(build_grid(), Store(tmp_path))
    assert list(examples.columns) == [*KEYS, "example", "value", "statistics"] and examples.empty
    write_examples(examples, tmp_path / "none.examples.parquet")
    assert read_examples(tmp_path / "none.examples.parquet").empty


def test_the_command_writes_the_examples_beside_the_table(tmp_path: Path) -> None:
    file, path = tmp_path / "small.yaml", tmp_path / "small.parquet"
    file.write_text("{description: made up, task: arithmetic, grid: {lmbda: [0, 1]}}")
    grid, store = experiments.load(str(file), outputs=tmp_path), Store(tmp_path)
    answers = [(f"p{n}", "#### 5" if n % 3 else "#### 4", "#### 5") for n in range(12)]
    write_cell_record(store, grid.cells[0], answers)
    words = ["table", str(file), "--outputs", str(tmp_path), "--examples"]
    assert CliRunner().invoke(app, [*words, "--format", "parquet", "-o", str(path)]).exit_code == 0
    examples = read_examples(tmp_path / "small.examples.parquet")
    assert list(examples["value"]) == [0.0, 100.0, 100.0] * 4
    assert set(examples["cell"]) == {grid.cells[0].fingerprint}
    refusal = CliRunner().invoke(app, [*words, "--format", "csv", "-o", str(path)]).exception
    assert isinstance(refusal, ConfigError) and "--examples needs a parquet file" in str(refusal)


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    for name, expected in (
        ("missing.parquet", "no examples"),
        ("text.parquet", "is not a parquet file"),
        ("other.parquet", "holds no examples: its columns are a"),
    ):
        with pytest.raises(ConfigError, match=expected):
            read_examples(tmp_path / name)
