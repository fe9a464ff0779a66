"""Runs of tiny experiments: complete records, no repeated work, failures that stay in their cell."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gkd_lab.config import Grid
from gkd_lab.models.rng import is_on_policy
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import RunOutcome, list_references, run_grid
from gkd_lab.store import Store

from .tiny_experiments import contents, options, table_of, times, tiny_grid

REAL_ROWS: dict[str, list[dict[str, str]]] = {
    "arithmetic": [
        {
            "question": f"Ann has {n} apples and buys {n + 1} more. How many are there?",
            "answer": f"{n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1}\n#### {2 * n + 1}",
        }
        for n in range(24)
    ],
    "translation": [{"en": f"page {n} of the book", "de": f"Seite {n} des Buches"} for n in range(24)],
    "summarization": [
        {"document": f"On day {n} the river rose. Roads were closed.", "summary": f"Flood on day {n}."}
        for n in range(24)
    ],
}


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


def run_successfully(grid: Grid, outputs: Path, **more: Any) -> RunOutcome:
    outcome = run_grid(grid, options(outputs, **more))
    assert outcome.failures == []
    assert outcome.busy_cell_count == 0
    return outcome


@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_run_leaves_complete_records_and_a_second_run_changes_nothing(task: str, tmp_path: Path) -> None:
    grid, outputs = tiny_grid(tmp_path, task), tmp_path / "outputs"
    run_successfully(grid, outputs)
    store = Store(outputs)
    auto = AutoModelForCausalLM if task == "arithmetic" else AutoModelForSeq2SeqLM
    for cell in grid.cells:
        record = store.get_record(cell)
        spec = json.loads((record.folder / "spec.json").read_text())
        assert spec["fingerprint"].startswith(cell.fingerprint)
        assert spec["spec"] == cell.training.model_dump(mode="json")
        status = record.read_status()
        assert (status["state"], status["steps"], status["shared_by"]) == ("done", 4, len(grid.cells))
        assert status["seconds"] > 0
        assert status["tokens"] > 0
        assert not record.steps_folder.exists()
        provenance = json.loads((record.folder / "provenance.json").read_text())
        assert provenance["pack"] == [c.fingerprint for c in sort_like_packs(grid)]
        assert [row["step"] for row in record.read_history()] == [2, 4]
        on_policy_steps = [is_on_policy(cell.lmbda, 0, step) for step in range(4)]
        on_policy_shares = [sum(on_policy_steps[:2]) / 2, sum(on_policy_steps[2:]) / 2]
        assert [row["on_policy"] for row in record.read_history()] == on_policy_shares
        assert auto.from_pretrained(record.checkpoint).num_parameters() > 0
        for evaluation, count in zip(cell.evaluations, (8, 5), strict=True):
            evaluation_record = record.get_evaluation(evaluation)
            assert evaluation_record.read_state() == "done"
            assert len(evaluation_record.read_prediction_rows()) == count
            assert set(evaluation.metrics) <= evaluation_record.read_scores().keys()
            assert all(evaluation_record.read_scores()[name]["signature"] for name in evaluation.metrics)
    weights = [load_file(store.get_record(cell).checkpoint / "model.safetensors") for cell in grid.cells]
    assert len({tuple(torch.cat([w.flatten() for w in d.values()]).tolist()) for d in weights}) == 6
    rows = table_of(grid, outputs)
    assert [row["role"] for row in rows].count("cell") == 6
    assert {row["status"] for row in rows} == {"done"}
    before = times(outputs)
    run_successfully(grid, outputs)
    assert times(outputs) == before


def sort_like_packs(grid: Grid) -> list[Any]:
    return sorted(grid.cells, key=lambda cell: (cell.seed, cell.lmbda, cell.beta))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "optimizer"), (("arithmetic", "adamw"), ("translation", "adafactor")))
def test_packed_and_unpacked_results_are_equal(task: str, optimizer: str, tmp_path: Path) -> None:
    """In float64, where rounding changes no sampled token."""
    changes: dict[str, Any] = {
        "precision": "fp64",
        "optimizer": optimizer,
        "grid": {"lmbda": [0.5, 1], "beta": [0, 0.5], "seed": [0, 1]},
    }
    grid = tiny_grid(tmp_path, task, **changes)
    run_successfully(grid, tmp_path / "packed")
    run_successfully(grid, tmp_path / "alone", pack="off")
    run_successfully(grid, tmp_path / "threes", pack=3)
    packed, alone, threes = (Store(tmp_path / name) for name in ("packed", "alone", "threes"))
    for cell in grid.cells:
        for other_store in (alone, threes):
            packed_weights = load_file(packed.get_record(cell).checkpoint / "model.safetensors")
            other_weights = load_file(other_store.get_record(cell).checkpoint / "model.safetensors")
            assert packed_weights.keys() == other_weights.keys()
            for name, weight in packed_weights.items():
                assert weight.dtype == torch.float64
                torch.testing.assert_close(weight, other_weights[name], rtol=0, atol=1e-9, msg=name)
            for evaluation in cell.evaluations:
                packed_evaluation = packed.get_record(cell).get_evaluation(evaluation)
                assert (
                    packed_evaluation.read_prediction_rows()
                    == other_store.get_record(cell).get_evaluation(evaluation).read_prediction_rows()
                )
                assert (
                    packed_evaluation.read_scores()
                    == other_store.get_record(cell).get_evaluation(evaluation).read_scores()
                )
    assert table_of(grid, tmp_path / "packed") == table_of(grid, tmp_path / "alone")


def test_failed_cell_is_listed_and_retried_only_on_request(tmp_path: Path) -> None:
    """A learning rate of 1e30 makes one cell of a pack fail."""
    changes: dict[str, Any] = {"grid": {"lmbda": [0], "learning_rate": [1e-3, 1e30]}}
    grid, outputs = tiny_grid(tmp_path, "arithmetic", **changes), tmp_path / "outputs"
    outcome = run_grid(grid, options(outputs))
    good, bad = (Store(outputs).get_record(cell) for cell in grid.cells)
    assert len(outcome.failures) == 1
    assert "FloatingPointError" in outcome.failures[0]
    assert str(bad.status_file) in outcome.failures[0]
    assert good.read_status()["state"] == "done"
    assert bad.read_status()["state"] == "failed"
    states = {row["cell"]: row["status"] for row in table_of(grid, outputs) if row["role"] == "cell"}
    assert sorted(states.values()) == ["done", "failed"]

    failure_time = bad.status_file.stat().st_mtime_ns
    times_before = times(good.folder)
    assert len(run_grid(grid, options(outputs)).failures) == 1
    assert bad.status_file.stat().st_mtime_ns == failure_time, "not retried without the option"
    assert len(run_grid(grid, options(outputs, retry_failed=True)).failures) == 1
    assert bad.status_file.stat().st_mtime_ns > failure_time
    assert times(good.folder) == times_before


def test_failed_teacher_skips_its_cells_and_is_retried_on_request(tmp_path: Path) -> None:
    grid, outputs = tiny_grid(tmp_path, "arithmetic"), tmp_path / "outputs"
    role, model, _ = list_references(grid.cells)[0]
    record = Store(outputs).get_artifact("nano", role, model)
    record.mark_failed("RuntimeError: broken on purpose")
    outcome = run_grid(grid, options(outputs))
    assert any("broken on purpose" in line and "6 cells" in line for line in outcome.failures)
    assert all(Store(outputs).get_record(cell).read_state() == "missing" for cell in grid.cells)
    run_successfully(grid, outputs, retry_failed=True)
    assert all(Store(outputs).get_record(cell).read_state() == "done" for cell in grid.cells)


def test_shared_artifacts_and_cells_are_built_once(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    first = tiny_grid(tmp_path, "arithmetic", "first", grid={"beta": [0, 0.5]})
    second = tiny_grid(tmp_path, "arithmetic", "second", grid={"beta": [0.5, 1]})
    run_successfully(first, outputs)
    before = times(outputs)
    run_successfully(second, outputs)
    after = times(outputs)
    shared = [name for name in before if name != ".packs/limits.json"]  # a second grid adds its own limit
    assert {name: after[name] for name in shared} == {name: before[name] for name in shared}
    new = {name.split("/")[2] for name in after.keys() - before.keys()}
    assert new == {second.cells[1].folder.split("/")[2]}


def test_total_variation_rescaled_divergence_and_bfloat16_run(tmp_path: Path) -> None:
    changes = {"grid": {"divergence": ["jsd", "tv"], "lmbda": [0, 1]}, "beta": 0.1}
    grid = tiny_grid(tmp_path, "arithmetic", precision="bf16", rescale_divergence=True, **changes)
    run_successfully(grid, tmp_path / "outputs")
    losses: dict[float, list[float]] = {0: [], 1: []}
    for cell in grid.cells:
        rows = Store(tmp_path / "outputs").get_record(cell).read_history()
        losses[cell.training.source.lmbda].append(rows[0]["loss"])
    assert all(len(set(pair)) == 2 and min(pair) > 0 for pair in losses.values())


@pytest.mark.parametrize("task", tuple(REAL_ROWS))
def test_folder_of_real_rows_runs(task: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = REAL_ROWS[task]
    for split, evaluation_record in (("train", rows[:16]), ("validation", rows[16:20]), ("test", rows[20:])):
        lines = "".join(json.dumps(row) + "\n" for row in evaluation_record)
        (data / f"{split}.jsonl").write_text(lines)
    grid = tiny_grid(
        tmp_path,
        task,
        data={"source": str(data)},
        tokenizer={"kind": "bpe", "vocab_size": 320},
        grid={"lmbda": [0, 1]},
        max_input_tokens=64,
        max_output_tokens=32,
        evaluations=[{"decoding": "beam", "num_beams": 2}],
    )
    outputs = tmp_path / "outputs"
    run_successfully(grid, outputs)
    rows_of_table = table_of(grid, outputs)
    assert {row["status"] for row in rows_of_table} == {"done"}
    for cell in grid.cells:
        predictions = (
            Store(outputs).get_record(cell).get_evaluation(cell.evaluations[0]).read_prediction_rows()
        )
        assert len(predictions) == 4
        assert cell.training.data.kind == "folder"


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0.5, 1]})
    run_successfully(grid, tmp_path / "one")
    run_successfully(grid, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
