"""Packs in a run: pretrained students, models that cannot be packed, packs that do not fit into memory."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from gkd_lab.config import Grid
from gkd_lab.evaluation.decoding import generate_predictions
from gkd_lab.runner.memory import (
    compute_capacity,
    is_out_of_memory_error,
    record_saved_bytes,
)
from gkd_lab.runner.progress import Reporter, silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.status.overview import build_overview
from gkd_lab.status.render import format_listing, list_cells, render_summary
from gkd_lab.store import Record, Store
from gkd_lab.training.trainer import GKDTrainer

from .tiny_experiments import options, table_of, tiny_grid

PAIR: dict[str, Any] = {"grid": {"lmbda": [0.5, 1]}, "evaluations": [{"decoding": "greedy"}]}
"""Two cells with one evaluation."""


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


@pytest.fixture(scope="module")
def model_outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> an outputs folder with an evaluated teacher and SFT student, and no cells."""
    outputs = {}
    for task in ("arithmetic", "translation"):
        folder = tmp_path_factory.mktemp(task)
        grid = tiny_grid(folder, task, **PAIR)
        run_grid(grid, options(folder / "outputs"))
        outputs[task] = copy_without_cells(grid, folder / "outputs", folder / "made")
    return outputs


def copy_without_cells(grid: Grid, outputs: Path, copy: Path) -> Path:
    """Copy an outputs folder without the cells of the grid and the limits of packs that it keeps."""
    shutil.copytree(outputs, copy, ignore=shutil.ignore_patterns(".packs"))
    for cell in grid.cells:
        shutil.rmtree(Store(copy).get_record(cell).folder)
    return copy


@pytest.fixture
def outputs(model_outputs: dict[str, Path], tmp_path: Path) -> Path:
    """Outputs folder of one test, with the reference models of `arithmetic`."""
    return shutil.copytree(model_outputs["arithmetic"], tmp_path / "outputs")


def read_comparable_status(record: Record) -> dict[str, Any]:
    """Return a record's status without its time and pack size."""
    return {k: v for k, v in record.read_status().items() if k not in ("seconds", "shared_by")}


def find_sft_student(outputs: Path) -> Path:
    (folder,) = outputs.glob("nano/*/start-*/checkpoint")
    return folder


def build_grid_with_student(folder: Path, task: str, student: Path, **changes: Any) -> Grid:
    return tiny_grid(folder, task, student={"pretrained": str(student)}, **{**PAIR, **changes})


def save_bart(folder: Path, tokenizer_from: Path) -> Path:
    """Save a model that cannot be packed, because its positions have a class of their own."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_from)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    widths = {"d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    counts = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads"), 1)
    config = BartConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        decoder_attention_heads=1,
        decoder_start_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        forced_eos_token_id=None,
        **widths,
        **counts,
        **ids,
    )
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def create_recorded_options(outputs: Path, **changes: Any) -> tuple[RunOptions, io.StringIO]:
    """Return options and the text that their run prints."""
    text = io.StringIO()
    return options(outputs, Reporter(Console(file=text, width=500)), **changes), text


def list_pack_sizes(grid: Grid, outputs: Path) -> list[int]:
    """Return the number of cells that shared each cell's model."""
    return [len(Store(outputs).get_record(cell).read_provenance()["pack"]) for cell in grid.cells]


def list_pack_limits(grid: Grid, outputs: Path) -> set[str | None]:
    return {Store(outputs).get_record(cell).read_provenance().get("pack_limit") for cell in grid.cells}


def render_plan(grid: Grid, outputs: Path, limit: Any = "auto") -> str:
    overview = build_overview(grid, Store(outputs), limit)
    return "\n".join(
        [format_listing(list_cells(grid, overview, show_progress=False)), *render_summary(overview)]
    )


@pytest.mark.parametrize("task", ["arithmetic", "translation"])
def test_packed_pretrained_students_equal_unpacked_ones(
    task: str, model_outputs: dict[str, Path], tmp_path: Path
) -> None:
    grid = build_grid_with_student(tmp_path, task, find_sft_student(model_outputs[task]), precision="fp64")
    packed, alone = tmp_path / "packed", tmp_path / "alone"
    assert "1 pack of 2" in render_plan(grid, packed)
    assert run_grid(grid, options(packed)).failures == []
    copy_without_cells(grid, packed, alone)
    assert run_grid(grid, options(alone, pack="off")).failures == []
    assert (list_pack_sizes(grid, packed), list_pack_sizes(grid, alone)) == ([2, 2], [1, 1])
    assert list_pack_limits(grid, packed) == list_pack_limits(grid, alone) == {None}
    auto = AutoModelForCausalLM if task == "arithmetic" else AutoModelForSeq2SeqLM
    for cell in grid.cells:
        packed_record, unpacked_record = Store(packed).get_record(cell), Store(alone).get_record(cell)
        files = [
            {p.relative_to(record.folder) for p in record.folder.rglob("*")}
            for record in (packed_record, unpacked_record)
        ]
        assert files[0] == files[1]
        assert (packed_record.folder / "spec.json").read_bytes() == (
            unpacked_record.folder / "spec.json"
        ).read_bytes()
        assert [record.read_status().pop("shared_by") for record in (packed_record, unpacked_record)] == [
            2,
            1,
        ]
        assert read_comparable_status(packed_record) == read_comparable_status(unpacked_record)
        for row, other in zip(packed_record.read_history(), unpacked_record.read_history(), strict=True):
            assert row == pytest.approx(other, rel=1e-6)
        weights, other_weights = (
            load_file(record.checkpoint / "model.safetensors") for record in (packed_record, unpacked_record)
        )
        torch.testing.assert_close(weights, other_weights, rtol=0, atol=1e-9)
        model = auto.from_pretrained(packed_record.checkpoint)
        assert type(model).__name__ in (packed_record.checkpoint / "config.json").read_text()
    assert table_of(grid, packed) == table_of(grid, alone)


def test_unpackable_cells_run_alone_with_the_reason(model_outputs: dict[str, Path], tmp_path: Path) -> None:
    student = save_bart(tmp_path / "bart", find_sft_student(model_outputs["translation"]))
    outputs = shutil.copytree(model_outputs["translation"], tmp_path / "outputs")
    grid = build_grid_with_student(tmp_path, "translation", student)
    assert "1 pack of 2" in render_plan(grid, outputs), "unknown before the first attempt"
    run_options, text = create_recorded_options(outputs)
    assert run_grid(grid, run_options).failures == []
    (line,) = [line for line in text.getvalue().splitlines() if "one after another" in line]
    reason = line.partition("one after another: ")[2]
    assert line.startswith("translation: 2 cells ")
    assert reason
    assert list_pack_sizes(grid, outputs) == [1, 1]
    assert list_pack_limits(grid, outputs) == {f"alone: {reason}"}
    called = [part.partition(": cell ")[2] for part in text.getvalue().splitlines() if ": done in" in part]
    assert [part[:8] for part in called if "distillation" in part] == [c.fingerprint for c in grid.cells]
    assert {row["status"] for row in table_of(grid, outputs)} == {"done"}
    plan = render_plan(grid, outputs)
    assert "2 packs of 1" in plan
    assert f"2 cells run alone: {reason}" in plan
    assert [line.split()[6] for line in plan.splitlines()[1:3]] == ["alone", "alone"]
    assert "run alone" not in render_plan(grid, outputs, "off")


def test_unpackable_reason_is_deleted_once_a_pack_is_built(outputs: Path) -> None:
    grid = tiny_grid(outputs.parent, "arithmetic", **PAIR)
    start = Store(outputs).get_artifact("nano", "start", grid.cells[0].training.start)
    start.write_unpackable_reason("an old module")
    assert "2 cells run alone: an old module" in render_plan(grid, outputs)
    run_grid(grid, options(outputs))
    assert list_pack_sizes(grid, outputs) == [2, 2]
    assert start.read_unpackable_reason() is None
    assert "run alone" not in render_plan(grid, outputs)


def test_record_of_a_cell_with_dropout_has_the_reason(outputs: Path) -> None:
    grid = tiny_grid(outputs.parent, "arithmetic", dropout=0.1, **PAIR)
    run_grid(grid, options(outputs))
    assert list_pack_limits(grid, outputs) == {"alone: dropout draws from one stream"}


def fail_packs_larger_than(cells: int, monkeypatch: pytest.MonkeyPatch, from_step: int = 0) -> None:
    """Let training steps and decoding of larger packs run out of memory."""
    step, decode = GKDTrainer.training_step, generate_predictions

    def training_step(trainer: GKDTrainer, *args: Any, **keywords: Any) -> Any:
        if trainer.pack.size > cells and trainer.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(trainer, *args, **keywords)

    def decode_or_fail(pack: Any, *args: Any) -> Any:
        if pack.size > cells:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return decode(pack, *args)

    monkeypatch.setattr(GKDTrainer, "training_step", training_step)
    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.generate_predictions", decode_or_fail)


def test_pack_out_of_memory_is_halved_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {"lmbda": [0.5, 1], "beta": [0, 0.5]}
    changes = {"precision": "fp64", "grid": axes, "evaluations": PAIR["evaluations"]}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    run_grid(grid, options(tmp_path / "whole"))
    copy_without_cells(grid, tmp_path / "whole", tmp_path / "halved")
    fail_packs_larger_than(2, monkeypatch, from_step=3)
    run_options, text = create_recorded_options(tmp_path / "halved")
    assert run_grid(grid, run_options).failures == []
    assert list_pack_sizes(grid, tmp_path / "halved") == [2] * 4
    assert list_pack_limits(grid, tmp_path / "halved") == {"out of memory with 4 cells as one model"}
    messages = [line for line in text.getvalue().splitlines() if "out of memory" in line]
    assert [re.findall(r"\d+", line) for line in messages] == [["4", "2"]] * 2
    whole, halved = Store(tmp_path / "whole"), Store(tmp_path / "halved")
    for cell in grid.cells:
        assert halved.get_record(cell).read_provenance()["resumed_at_step"] == 2
        assert [row["step"] for row in halved.get_record(cell).read_history()] == [2, 4]
        weights, halved_weights = (
            load_file(s.get_record(cell).checkpoint / "model.safetensors") for s in (whole, halved)
        )
        torch.testing.assert_close(weights, halved_weights, rtol=0, atol=1e-9)
    assert table_of(grid, tmp_path / "whole") == table_of(grid, tmp_path / "halved")


def test_cell_too_large_alone_fails_and_others_finish(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, tried = GKDTrainer.training_step, []

    def training_step(trainer: GKDTrainer, *args: Any, **keywords: Any) -> Any:
        if trainer.state.global_step == 0:
            tried.append(len(trainer.cells))
        if any(cell.lmbda == 0 for cell in trainer.cells):
            raise MemoryError("no room")
        return step(trainer, *args, **keywords)

    monkeypatch.setattr(GKDTrainer, "training_step", training_step)
    changes: dict[str, Any] = {"grid": {"lmbda": [0, 0.5, 1]}, "evaluations": PAIR["evaluations"]}
    grid = tiny_grid(outputs.parent, "arithmetic", **changes)
    (line,) = run_grid(grid, options(outputs, pack=4)).failures
    assert grid.cells[0].fingerprint in line
    assert "out of memory even with one row at a time" in line
    status = Store(outputs).get_record(grid.cells[0]).read_status()
    assert "MemoryError: no room" in status["traceback"], "the cause"
    assert tried == [3, 2, *[1] * 3, 1, 1], "the first cell with 4, 2 and 1 rows at a time"
    assert [Store(outputs).get_record(cell).read_state() for cell in grid.cells] == ["failed", "done", "done"]


def test_automatic_packs_fit_into_memory(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd_lab.runner.train_cells.measure_step_bytes", lambda trainer, inputs: 2**30)
    monkeypatch.setattr("gkd_lab.runner.train_cells.measure_free_bytes", lambda device: 5 * 2**30)
    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.measure_free_bytes", lambda device: 5 * 2**30)
    grid = tiny_grid(outputs.parent, "arithmetic", evaluations=PAIR["evaluations"])
    run_options, text = create_recorded_options(outputs)
    assert run_grid(grid, run_options).failures == []
    assert list_pack_sizes(grid, outputs) == [3] * 6
    (reason,) = list_pack_limits(grid, outputs)
    assert re.findall(r"\d+", reason) == ["6", "6", "5", "3"], "cells, GiB needed, GiB free, cells at a time"
    assert text.getvalue().count(reason) == 1
    assert f"arithmetic: {reason}" in text.getvalue()


def test_requested_pack_size_is_not_measured(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd_lab.runner.train_cells.measure_free_bytes", lambda device: 1)
    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.measure_free_bytes", lambda device: 1)
    grid = tiny_grid(outputs.parent, "arithmetic", **{**PAIR, "grid": {"lmbda": [0, 0.5, 1]}})
    run_grid(grid, options(outputs, pack=2))
    assert list_pack_sizes(grid, outputs) == [2, 2, 1]
    assert list_pack_limits(grid, outputs) == {None}


def test_evaluation_packs_fit_into_memory(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = generate_predictions, []

    def decode_or_fail(pack: Any, *args: Any) -> Any:
        sizes.append(pack.size)
        return decode(pack, *args)

    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.generate_predictions", decode_or_fail)
    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.measure_free_bytes", lambda device: 1)
    run_grid(tiny_grid(outputs.parent, "arithmetic", **PAIR), options(outputs))
    assert sizes == [1, 1]


def test_memory_of_a_cell_is_measured_on_its_own_step(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the rows save twice the activations; weights, gradients and moments stay."""
    from gkd_lab.runner import train_cells

    measured = []

    def measure(trainer: Any, inputs: Any) -> int:
        weights = sum(p.numel() * 4 for p in trainer.model.parameters())
        doubled = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
        once, twice = (original(trainer, batch) - 4 * weights for batch in (inputs, doubled))
        measured.append((inputs, once, twice))
        return once

    original = train_cells.measure_step_bytes
    monkeypatch.setattr(train_cells, "measure_step_bytes", measure)
    run_grid(tiny_grid(outputs.parent, "arithmetic", **PAIR), options(outputs))
    ((inputs, once, twice),) = measured
    assert inputs["completion_ids"].shape == (4, 10), "all that can be sampled"
    assert inputs["prompt_ids"].shape[1] <= 24
    assert once > 4 * 20 * 8 * 4, "more than one layer's input"
    assert twice == pytest.approx(2 * once, rel=0.1)


def test_saved_bytes_count_each_storage_once_and_no_weight() -> None:
    layer = nn.Linear(4, 4)
    x = torch.ones(5, 4, requires_grad=True)
    with record_saved_bytes(layer) as saved_bytes:
        (layer(x) + layer(x)).square().sum()
    assert sum(saved_bytes.values()) == 2 * 5 * 4 * 4, "the input and the sum that is squared"


@pytest.mark.parametrize(
    ("cells", "bytes_per_cell", "free", "limit"),
    [(6, 10, 75, 6), (6, 10, 74, 3), (6, 10, 25, 2), (6, 10, 3, 1)],
)
def test_pack_uses_four_fifths_of_the_free_memory(
    cells: int, bytes_per_cell: int, free: int, limit: int
) -> None:
    capacity = compute_capacity(cells, bytes_per_cell, free)
    assert capacity.max_cells == limit
    assert bool(capacity.reason) == (limit < cells)


def test_out_of_memory_errors_are_recognized() -> None:
    texts = ("CUDA out of memory.", "DefaultCPUAllocator: not enough memory", "x: Can't allocate memory")
    assert all(is_out_of_memory_error(RuntimeError(text)) for text in texts)
    assert is_out_of_memory_error(MemoryError())
    assert is_out_of_memory_error(torch.OutOfMemoryError())
    assert not is_out_of_memory_error(RuntimeError("shapes differ"))
    assert not is_out_of_memory_error(ValueError("out of memory"))
