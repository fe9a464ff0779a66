"""Claims judged on runs: intervals decide, gaps are named, baselines are recognised."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gkd_lab.claims.definitions import CLAIMS
from gkd_lab.claims.judge import judge_run, judge_table
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.claims.verdict_text import encode_verdicts, format_decision, format_detail, format_verdict_lines
from gkd_lab.claims.verdicts import ClaimVerdict
from gkd_lab.config import Cell, Grid, RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.experiment import parse_experiment
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import FakeTask, build_grid, fill_store, write_finished_record

ScoreFunction = Callable[[Cell], float]
NOISE = (-1.0, 0.0, 1.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def judge_claim(grid: Grid, store: Store, name: str) -> ClaimVerdict:
    """Judge one claim on a run."""
    return {verdict.claim.id: verdict for verdict in judge_run(grid, store)}[name]


def build_seeded_score(effect: float, spread: float) -> ScoreFunction:
    """Build scores to which lmbda adds `effect`, with noise of `spread` over seeds."""
    return lambda cell: 40.0 + cell.lmbda * (effect + spread * NOISE[cell.seed])


def draw_noise(cell: Cell, spread: float = 0.1) -> float:
    """Return noise of a cell that is not a multiple of 1 / 50, and differs by seed and settings."""
    settings = str(sorted((name, str(value)) for name, value in cell.labels.items()))
    return spread * random.Random(settings).gauss(0.0, 1.0)


def test_a_column_holds_when_its_interval_lies_above_zero(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "beta": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, score=build_seeded_score(5.0, 1.0))
    verdict = judge_claim(grid, store, "C1")
    # t(0.975, 2) / sqrt(3) = 2.484; the upper end is that of two columns, t(0.9875, 2) / sqrt(3) = 3.583
    assert (verdict.verdict, len(verdict.columns), format_detail(verdict)) == ("holds", 2, "2 of 2")
    assert (verdict.effect, verdict.low, verdict.high) == pytest.approx((5.0, 5 - 2.484, 5 + 3.583), abs=1e-3)


def test_a_column_fails_below_zero_and_is_undecided_around_zero(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "beta": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, score=build_seeded_score(-5.0, 1.0))
    verdict = judge_claim(grid, store, "C1")
    assert verdict.verdict == "fails"
    assert format_detail(verdict) == "0 of 2; fails: forward KL (-5.00) | reverse KL (-5.00)"
    undecided = Store(store.root / "undecided")
    fill_store(grid, undecided, score=build_seeded_score(1.0, 1.0))
    assert judge_claim(grid, undecided, "C1").verdict == "undecided"
    assert (
        format_detail(judge_claim(grid, undecided, "C1"))
        == "0 of 2; undecided: forward KL (+1.00) | reverse KL (+1.00)"
    )


def test_one_failing_column_makes_the_claim_fail(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "beta": [0, 0.1, 1], "seed": [0, 1, 2]})
    fill_store(
        grid,
        store,
        score=lambda cell: 40 + cell.seed + cell.lmbda * (-3 if cell.beta == 1 else 3) + draw_noise(cell),
    )
    verdict = judge_claim(grid, store, "C1")
    assert verdict.verdict == "fails"
    assert re.fullmatch(r"2 of 3; fails: reverse KL \(-[23]\.\d\d\)", format_detail(verdict))


def test_seeds_are_paired(store: Store) -> None:
    """A seed's shift of both models is no noise in their difference."""
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]})
    fill_store(
        grid, store, score=lambda cell: 40 + 10 * NOISE[cell.seed] + 1.01 * cell.lmbda + draw_noise(cell)
    )
    low = judge_claim(grid, store, "C1").low
    assert low is not None and 0.3 < low < 1.1


def test_equal_differences_over_seeds_are_no_proof(store: Store) -> None:
    """Two seeds that are both better by one example of 50 agree by chance."""
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1]})
    fill_store(grid, store, score=lambda cell: 40 + 2 * cell.lmbda)
    (verdict,) = judge_table(build_long_table(grid, store), ["C1"])
    assert (verdict.verdict, verdict.effect) == ("undecided", 2.0)
    assert verdict.low == pytest.approx(2 - 12.706 * 2 / math.sqrt(2), abs=1e-2)


def test_one_seed_decides_nothing(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1]})
    fill_store(grid, store, score=lambda cell: 80.0 if cell.lmbda else 40.0)
    verdict = judge_claim(grid, store, "C1")
    assert verdict.verdict == "undecided"
    assert verdict.low is not None and 20 < verdict.low < 40 < verdict.high < 60  # type: ignore[operator]
    assert "two seeds" in format_decision(verdict)
    (without_examples,) = judge_table(build_long_table(grid, store), ["C1"])
    assert (without_examples.verdict, without_examples.effect, without_examples.low) == (
        "undecided",
        40.0,
        None,
    )


def test_missing_cells_are_named_and_the_others_judged(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "beta": [0, 1], "seed": [0, 1, 2]})
    done = [cell for cell in grid.cells if not (cell.lmbda == 1 and cell.beta == 1)]
    fill_store(grid, store, cells=done, score=build_seeded_score(5.0, 1.0))
    verdict = judge_claim(grid, store, "C1")
    assert (verdict.verdict, format_detail(verdict)) == ("holds", "1 of 1; not done: λ = 1, reverse KL")


def test_every_claim_of_an_empty_store_has_a_reason(store: Store) -> None:
    verdicts = judge_run(build_grid(), store)
    assert all(verdict.verdict == "undecided" and len(verdict.columns) == 0 for verdict in verdicts)
    assert all(format_detail(verdict).startswith("0 of 0; cannot be judged: ") for verdict in verdicts)
    assert all(len(format_detail(verdict)) > len("0 of 0; cannot be judged: ") for verdict in verdicts)


def test_an_unjudged_claim_names_the_missing_axis_or_task(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0.5, 1]})
    fill_store(grid, store)
    assert "(λ = 0)" in format_detail(judge_claim(grid, store, "C1"))
    assert "task translation" in format_detail(judge_claim(grid, store, "C9"))
    assert "axis train_rows" in format_detail(judge_claim(grid, store, "C19"))
    assert "run --pack off" in format_detail(judge_claim(grid, store, "C26"))
    assert "summarization" in format_detail(judge_claim(grid, store, "C22"))


METHODS = ["gkd", "supervised_kd", "seqkd", "imitkd", "f_distill", "sft"]
METHOD_SCORES = dict(zip(METHODS, (60.0, 50.0, 45.0, 55.0, 52.0, 42.0), strict=True))


def score_method(cell: Cell) -> float:
    return METHOD_SCORES[cell.labels["method"]] + draw_noise(cell)


def fill_method_grid(store: Store) -> Grid:
    grid = build_grid(grid={"method": METHODS, "seed": [0, 1, 2]}, lmbda=1, beta=0)
    fill_store(grid, store, score=score_method)
    return grid


def test_baselines_are_recognised_by_their_settings(store: Store) -> None:
    grid = fill_method_grid(store)
    verdict = judge_claim(grid, store, "C14")
    assert (verdict.verdict, len(verdict.columns)) == ("holds", 1)
    labels = [c.label.removeprefix("against ") for c in verdict.columns[0].contrasts]
    assert labels == ["the SFT student", "supervised KD", "SeqKD"]
    assert [round(c.effect) for c in verdict.columns[0].contrasts] == [30, 10, 15]
    mixed = judge_claim(grid, store, "C15")
    assert [round(c.effect) for c in mixed.columns[0].contrasts] == [5, 8]


def test_baselines_in_a_parquet_file_are_recognised_by_their_method(store: Store) -> None:
    """A committed parquet file has no store beside it."""
    grid = fill_method_grid(store)
    file = store.root / "table.parquet"
    build_long_table(grid, store).drop(columns="stands_for").to_parquet(file)
    (verdict,) = judge_table(pd.read_parquet(file), ["C14"])
    assert (verdict.verdict, len(verdict.columns)) == ("holds", 1)
    assert len(verdict.columns[0].contrasts) == 3


def test_a_grid_without_a_method_axis_is_judged_on_its_cells(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 0.5, 1], "beta": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, score=build_seeded_score(5.0, 0.1))
    verdict = judge_claim(grid, store, "C14")
    assert verdict.verdict == "holds"
    assert "not in the table: SeqKD" in format_detail(verdict)


def test_the_best_divergence_must_beat_each_of_the_others(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [1], "beta": [0, 0.1, 1], "seed": [0, 1, 2]})
    fill_store(
        grid, store, score=lambda cell: 50.0 - 3 * cell.beta - (cell.beta > 0) + draw_noise(cell, 0.02)
    )
    verdict = judge_claim(grid, store, "C12")
    assert verdict.verdict == "holds"
    assert verdict.effect == pytest.approx(1.3, abs=0.05)  # against JSD(0.1), the least of its leads
    assert "not in the table: JSD(0.5), JSD(0.9)" in format_detail(verdict)


def test_gains_are_measured_from_the_start(store: Store) -> None:
    """60 - 30 is less than 1.9 times the mean of 50 - 30 and 45 - 30."""
    grid = fill_method_grid(store)
    verdict = judge_claim(grid, store, "C16")
    assert verdict.verdict == "fails"
    assert verdict.effect == pytest.approx(30 - 1.9 * 17.5, abs=0.2)
    ratios = [float(text) for text in re.findall(r"([\d.]+) \(said: 1.9\)", format_detail(verdict))]
    assert ratios == pytest.approx([30 / 17.5, 30 / 20], abs=0.02)


def build_task_grid(task: FakeTask, **document: Any) -> Grid:
    """Build a grid of another task, with the number of training rows in its data."""
    revisions = RevisionLookup(
        resolve_data=lambda name, settings: DataSpec(
            kind="made", name=name, revision="1", train=settings.train
        ),
        resolve_model=lambda name: (name, None, "1"),
    )
    experiment = parse_experiment({"description": "made up", "task": task.name, **document}, "made.yaml")
    return expand_grid("made", experiment, {task.name: task}, revisions)


def test_train_shares_are_relative_to_the_most_rows_in_the_table(store: Store) -> None:
    axes = {"train_rows": [50, 1000], "method": ["supervised_kd", "imitkd", "gkd"], "seed": [0, 1, 2]}
    grid = build_task_grid(FakeTask("arithmetic"), grid=axes, lmbda=1, beta=0.1)
    values = {(50, "gkd"): 48.0, (1000, "gkd"): 60.0}

    def value(cell: Cell) -> float:
        return values.get((cell.labels["train_rows"], cell.labels["method"]), 50.0) + draw_noise(cell, 0.02)

    fill_store(grid, store, score=value)
    verdict = judge_claim(grid, store, "C18")
    assert (verdict.verdict, verdict.effect) == ("fails", pytest.approx(-2.0, abs=0.05))
    assert verdict.weakest.margin == 1.3


def test_diversity_is_judged_at_each_sampling_temperature(store: Store) -> None:
    sampled = [
        {"decoding": "sample", "temperature": t, "samples": 4, "metrics": ["rouge2", "self_bleu"]}
        for t in (1, 0.5)
    ]
    axes = {"beta": [0, 0.5, 1], "seed": [0, 1, 2]}
    task = FakeTask("summarization", ("rouge2",))
    grid = build_task_grid(task, grid=axes, lmbda=1, evaluations=sampled)
    fill_store(grid, store, score=lambda cell: 40 + 2 * (cell.beta or 0) + draw_noise(cell, 0.01))
    verdict = judge_claim(grid, store, "C7")
    assert (verdict.verdict, format_detail(verdict)) == ("holds", "2 of 2")
    assert verdict.effect == pytest.approx(0.5, abs=0.03)
    assert {column.shared["temperature"] for column in verdict.columns} == {0.5, 1.0}
    assert judge_claim(grid, store, "C6").verdict == "holds"
    assert judge_claim(grid, store, "C8").verdict == "undecided"  # as wide at both


def test_self_distillation_is_recognised_by_equal_models(store: Store) -> None:
    axes = {"method": ["supervised_kd", "imitkd", "f_distill", "gkd"], "beta": [0, 0.9], "seed": [0, 1, 2]}
    grid = build_grid(grid=axes, lmbda=1, student="base", teacher="base")
    fill_store(grid, store, score=lambda cell: score_method(cell) + (cell.beta or 0), teacher_score=41.0)
    assert judge_claim(grid, store, "C24").verdict == "holds"
    assert format_detail(judge_claim(grid, store, "C24")).startswith("3 of 3")
    assert "than its teacher" in format_detail(judge_claim(grid, store, "C1"))


def test_step_times_are_measured_on_cells_that_ran_alone(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 0.5, 1]})
    for cell in grid.cells:
        record = store.get_record(cell)
        write_finished_record(record, cell, 40.0)
        seconds = 15.0 + 15.0 * cell.lmbda
        record.write_provenance(
            {"spent": {"seconds": seconds}, "pack": [cell.fingerprint], "resumed_at_step": 0}
        )
    assert judge_claim(grid, store, "C26").effect == pytest.approx(2.0)
    store.get_record(grid.cells[0]).write_provenance({"spent": {"seconds": 15.0}, "pack": ["a", "b"]})
    assert judge_claim(grid, store, "C26").columns == []


def test_json_has_the_documented_fields(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, score=build_seeded_score(5.0, 1.0))
    rows: list[dict[str, Any]] = json.loads(encode_verdicts(judge_run(grid, store)))
    assert [row["id"] for row in rows] == list(CLAIMS)
    assert all(
        {"id", "verdict", "effect", "low", "high", "n", "detail", "comparisons"} <= set(row) for row in rows
    )
    (comparison,) = rows[0]["comparisons"]
    assert (comparison["n"], comparison["outcome"], comparison["effect"]) == (3, "holds", 5.0)
    assert {row["verdict"] for row in rows} <= {"holds", "fails", "undecided"}
    assert (rows[0]["verdict"], rows[0]["required_seeds"]) == ("holds", None)


def test_an_undecided_claim_says_how_many_seeds_would_decide_it(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "beta": [0, 1], "seed": [0, 1, 2]})
    fill_store(
        grid, store, score=lambda cell: 40.0 + cell.lmbda * (2 * NOISE[cell.seed] - (2 if cell.beta else 0))
    )
    (verdict,) = judge_table(build_long_table(grid, store), ["C1"])
    assert [contrast.effect for contrast in verdict.contrasts] == [0.0, -2.0]
    row = json.loads(encode_verdicts([verdict]))[0]
    below = row["comparisons"][1]["required_seeds"]
    assert row["required_seeds"] == below == 13  # power 0.79 at 12, by the noncentral t at 0.0125
    assert row["comparisons"][0]["required_seeds"] is None
    assert format_decision(verdict).startswith("about 13 seeds would probably decide it")


def test_a_span_of_two_seeds_needs_a_third(store: Store) -> None:
    grid = build_grid(lmbda=1, grid={"student": ["small", "base"], "beta": [0, 1], "seed": [0, 1]})
    fill_store(grid, store, score=lambda cell: 40.0 + draw_noise(cell, 1.0))
    (verdict,) = judge_table(build_long_table(grid, store), ["C25"])
    assert format_decision(verdict) == "three seeds or more are needed for a verdict"


def test_text_shows_judged_and_named_claims_first_and_others_in_one_line(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, score=build_seeded_score(5.0, 1.0))
    lines = list(format_verdict_lines(judge_run(grid, store), ["C9"]))
    text = "\n".join(lines)
    assert lines[0].split()[:2] == ["C1", "holds"]
    assert "+5.00 [+2.52, +7.48] (t over 3 seeds" in text
    assert "C9   not judged" in text.split("not judged:")[0]
    assert "C10" in text.split("\nnot judged:")[1]


def test_a_table_without_cells_tells_the_loss_by_its_divergence(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [1], "divergence": ["jsd", "tv"], "beta": [0.5]})
    fill_store(grid, store)
    frame = build_long_table(grid, store)
    trained = [model for model in load_table_scores(frame).models if model["role"] == "cell"]
    assert {(cell["loss"], cell["beta"]) for cell in trained} == {("jsd", 0.5), ("tv", None)}
    frame["divergence"] = frame["divergence"].replace("tv", "hellinger")
    assert {model["loss"] for model in load_table_scores(frame).models} >= {"jsd", "hellinger"}
