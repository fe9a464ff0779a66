"""What shares a model in a run: loaded students, what cannot be packed, what does not fit into memory."""

import io
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
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.memory import (
    compute_capacity,
    is_out_of_memory_error,
    iterate_cgroup_free_bytes,
    measure_free_bytes,
    record_saved_bytes,
)
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.status.overview import build_overview
from gkd_lab.status.render import format_listing, list_cells, render_summary
from gkd_lab.store import Record, Store
from gkd_lab.training.trainer import GKDTrainer

from .tiny_experiments import options, table_of, tiny_grid

PAIR: dict[str, Any] = {"grid": {"lmbda": [0.5, 1]}, "evaluations": [{"decoding": "greedy"}]}
"""Two cells, judged once."""


@pytest.fixture(scope="module", autouse=True)
def silence() -> None:
    silence_libraries()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> an outputs folder that holds a teacher and a starting student with what was judged of them."""
    found = {}
    for task in ("arithmetic", "translation"):
        folder = tmp_path_factory.mktemp(task)
        grid = tiny_grid(folder, task, **PAIR)
        run_grid(grid, options(folder / "outputs"))
        found[task] = without_cells(grid, folder / "outputs", folder / "made")
    return found


def without_cells(grid: Grid, outputs: Path, copy: Path) -> Path:
    """A copy of an outputs folder in which no cell of the grid is done."""
    shutil.copytree(outputs, copy)
    for cell in grid.cells:
        shutil.rmtree(Store(copy).get_record(cell).folder)
    return copy


@pytest.fixture
def outputs(made: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of our own to work in, where the models of `arithmetic` are made already."""
    return shutil.copytree(made["arithmetic"], tmp_path / "outputs")


def verdict(record: Record) -> dict[str, Any]:
    """What a status says but how long it took, and with whom."""
    return {k: v for k, v in record.read_status().items() if k not in ("seconds", "shared_by")}


def start_in(outputs: Path) -> Path:
    (folder,) = outputs.glob("nano/*/start-*/checkpoint")
    return folder


def with_student(folder: Path, task: str, student: Path, **changes: Any) -> Grid:
    return tiny_grid(folder, task, student={"pretrained": str(student)}, **{**PAIR, **changes})


def bart(folder: Path, tokenizer_from: Path) -> Path:
    """A model whose positions are looked up by a class of its own."""
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


def told(outputs: Path, **changes: Any) -> tuple[RunOptions, io.StringIO]:
    """Options, and what their run says."""
    text = io.StringIO()
    return options(outputs, Reporter(Console(file=text, width=500)), **changes), text


def packs_of(grid: Grid, outputs: Path) -> list[int]:
    """How many cells shared each cell's model."""
    return [len(Store(outputs).get_record(cell).read_provenance()["pack"]) for cell in grid.cells]


def limits_of(grid: Grid, outputs: Path) -> set[str | None]:
    return {Store(outputs).get_record(cell).read_provenance().get("pack_limit") for cell in grid.cells}


def planned(grid: Grid, outputs: Path, limit: Any = "auto") -> str:
    found = build_overview(grid, Store(outputs), limit)
    return "\n".join([format_listing(list_cells(grid, found, show_progress=False)), *render_summary(found)])


@pytest.mark.parametrize("task", ["arithmetic", "translation"])
def test_a_loaded_student_is_packed_and_each_cell_leaves_what_it_leaves_alone(
    task: str, made: dict[str, Path], tmp_path: Path
) -> None:
    grid = with_student(tmp_path, task, start_in(made[task]), precision="fp64")
    packed, alone = tmp_path / "packed", tmp_path / "alone"
    assert "1 pack of 2" in planned(grid, packed)
    assert run_grid(grid, options(packed)).failures == []
    without_cells(grid, packed, alone)
    assert run_grid(grid, options(alone, pack="off")).failures == []
    assert (packs_of(grid, packed), packs_of(grid, alone)) == ([2, 2], [1, 1])
    assert limits_of(grid, packed) == limits_of(grid, alone) == {None}
    auto = AutoModelForCausalLM if task == "arithmetic" else AutoModelForSeq2SeqLM
    for cell in grid.cells:
        ours, theirs = Store(packed).get_record(cell), Store(alone).get_record(cell)
        files = [{p.relative_to(one.folder) for p in one.folder.rglob("*")} for one in (ours, theirs)]
        assert files[0] == files[1]
        assert (ours.folder / "spec.json").read_bytes() == (theirs.folder / "spec.json").read_bytes()
        assert [one.read_status().pop("shared_by") for one in (ours, theirs)] == [2, 1]
        assert verdict(ours) == verdict(theirs)
        for row, other in zip(ours.read_history(), theirs.read_history(), strict=True):
            assert row == pytest.approx(other, rel=1e-6)
        weights, others = (load_file(one.checkpoint / "model.safetensors") for one in (ours, theirs))
        torch.testing.assert_close(weights, others, rtol=0, atol=1e-9)
        model = auto.from_pretrained(ours.checkpoint)
        assert type(model).__name__ in (ours.checkpoint / "config.json").read_text()
    assert table_of(grid, packed) == table_of(grid, alone)


def test_cells_that_cannot_be_packed_run_alone_in_order_and_say_why(
    made: dict[str, Path], tmp_path: Path
) -> None:
    student = bart(tmp_path / "bart", start_in(made["translation"]))
    outputs = shutil.copytree(made["translation"], tmp_path / "outputs")
    grid = with_student(tmp_path, "translation", student)
    assert "1 pack of 2" in planned(grid, outputs), "it is not known before it is tried"
    asked, text = told(outputs)
    assert run_grid(grid, asked).failures == []
    (line,) = [line for line in text.getvalue().splitlines() if "one after another" in line]
    reason = line.partition("one after another: ")[2]
    assert line.startswith("translation: 2 cells run alone, one after another: ")
    assert reason
    assert packs_of(grid, outputs) == [1, 1]
    assert limits_of(grid, outputs) == {f"alone: {reason}"}
    called = [part.partition(": cell ")[2] for part in text.getvalue().splitlines() if ": done in" in part]
    assert [part[:8] for part in called if "distillation" in part] == [c.fingerprint for c in grid.cells]
    assert {row["status"] for row in table_of(grid, outputs)} == {"done"}
    plan = planned(grid, outputs)
    assert "2 packs of 1" in plan
    assert f"2 cells run alone: {reason}" in plan
    assert [line.split()[6] for line in plan.splitlines()[1:3]] == ["alone", "alone"]
    assert "run alone" not in planned(grid, outputs, "off")


def test_a_reason_is_forgotten_once_the_pack_can_be_made(outputs: Path) -> None:
    grid = tiny_grid(outputs.parent, "arithmetic", **PAIR)
    start = Store(outputs).get_artifact("nano", "start", grid.cells[0].training.start)
    start.write_unpackable_reason("no packed form for a module of old")
    assert "2 cells run alone: no packed form for a module of old" in planned(grid, outputs)
    run_grid(grid, options(outputs))
    assert packs_of(grid, outputs) == [2, 2]
    assert start.read_unpackable_reason() is None
    assert "run alone" not in planned(grid, outputs)


def test_a_cell_with_dropout_says_in_its_record_why_it_ran_alone(outputs: Path) -> None:
    grid = tiny_grid(outputs.parent, "arithmetic", dropout=0.1, **PAIR)
    run_grid(grid, options(outputs))
    assert limits_of(grid, outputs) == {"alone: dropout draws from one stream"}


def out_of_memory_above(cells: int, monkeypatch: pytest.MonkeyPatch, from_step: int = 0) -> None:
    """Steps of larger packs fail as on a full GPU, decoding for them as on a full machine."""
    step, decode = GKDTrainer.training_step, generate_predictions

    def training_step(trainer: GKDTrainer, *args: Any, **more: Any) -> Any:
        if trainer.pack.size > cells and trainer.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(trainer, *args, **more)

    def decoded(pack: Any, *args: Any) -> Any:
        if pack.size > cells:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return decode(pack, *args)

    monkeypatch.setattr(GKDTrainer, "training_step", training_step)
    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.generate_predictions", decoded)


def test_a_pack_that_runs_out_of_memory_goes_on_in_halves_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"lmbda": [0.5, 1], "beta": [0, 0.5]}
    changes = {"precision": "fp64", "grid": axes, "evaluations": PAIR["evaluations"]}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    run_grid(grid, options(tmp_path / "whole"))
    without_cells(grid, tmp_path / "whole", tmp_path / "halved")
    out_of_memory_above(2, monkeypatch, from_step=3)
    asked, text = told(tmp_path / "halved")
    assert run_grid(grid, asked).failures == []
    assert packs_of(grid, tmp_path / "halved") == [2] * 4
    assert limits_of(grid, tmp_path / "halved") == {"out of memory with 4 cells as one model"}
    said = [line for line in text.getvalue().splitlines() if "out of memory" in line]
    assert said == ["arithmetic: out of memory with 4 cells as one model; going on with 2 at a time"] * 2
    whole, halved = Store(tmp_path / "whole"), Store(tmp_path / "halved")
    for cell in grid.cells:
        assert halved.get_record(cell).read_provenance()["resumed_at_step"] == 2
        assert [row["step"] for row in halved.get_record(cell).read_history()] == [2, 4]
        ours, theirs = (
            load_file(s.get_record(cell).checkpoint / "model.safetensors") for s in (whole, halved)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert table_of(grid, tmp_path / "whole") == table_of(grid, tmp_path / "halved")


def test_a_cell_that_is_too_large_alone_fails_as_others_do_and_its_neighbours_finish(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, tried = GKDTrainer.training_step, []

    def training_step(trainer: GKDTrainer, *args: Any, **more: Any) -> Any:
        if trainer.state.global_step == 0:
            tried.append(len(trainer.cells))
        if any(cell.lmbda == 0 for cell in trainer.cells):
            raise MemoryError("no room")
        return step(trainer, *args, **more)

    monkeypatch.setattr(GKDTrainer, "training_step", training_step)
    changes: dict[str, Any] = {"grid": {"lmbda": [0, 0.5, 1]}, "evaluations": PAIR["evaluations"]}
    grid = tiny_grid(outputs.parent, "arithmetic", **changes)
    (line,) = run_grid(grid, options(outputs, pack=4)).failures
    assert grid.cells[0].fingerprint in line
    assert "MemoryError: no room" in line
    assert tried == [3, 2, *[1] * 3, 1, 1], "the first cell with 4, 2 and 1 rows at a time"
    assert [Store(outputs).get_record(cell).read_state() for cell in grid.cells] == ["failed", "done", "done"]


def test_auto_makes_packs_that_fit_into_memory(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd_lab.runner.train_cells.measure_step_bytes", lambda trainer, inputs: 2**30)
    monkeypatch.setattr("gkd_lab.runner.train_cells.measure_free_bytes", lambda device: 5 * 2**30)
    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.measure_free_bytes", lambda device: 5 * 2**30)
    grid = tiny_grid(outputs.parent, "arithmetic", evaluations=PAIR["evaluations"])
    asked, text = told(outputs)
    assert run_grid(grid, asked).failures == []
    assert packs_of(grid, outputs) == [3] * 6
    reason = "6 cells as one model need about 6 GiB, 5 GiB are free: at most 3 at a time"
    assert text.getvalue().count(reason) == 1
    assert f"arithmetic: {reason}" in text.getvalue()
    assert limits_of(grid, outputs) == {reason}


def test_a_number_of_cells_is_taken_as_it_is(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd_lab.runner.train_cells.measure_free_bytes", lambda device: 1)
    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.measure_free_bytes", lambda device: 1)
    grid = tiny_grid(outputs.parent, "arithmetic", **{**PAIR, "grid": {"lmbda": [0, 0.5, 1]}})
    run_grid(grid, options(outputs, pack=2))
    assert packs_of(grid, outputs) == [2, 2, 1]
    assert limits_of(grid, outputs) == {None}


def test_what_was_trained_in_parts_is_judged_in_parts_that_fit(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, sizes = generate_predictions, []

    def decoded(pack: Any, *args: Any) -> Any:
        sizes.append(pack.size)
        return decode(pack, *args)

    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.generate_predictions", decoded)
    monkeypatch.setattr("gkd_lab.runner.evaluate_cells.measure_free_bytes", lambda device: 1)
    run_grid(tiny_grid(outputs.parent, "arithmetic", **PAIR), options(outputs))
    assert sizes == [1, 1]


def test_what_a_cell_needs_is_measured_on_its_own_step(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the rows save twice as much; weights, gradients and moments stay."""
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


def test_what_is_saved_counts_each_storage_once_and_no_weight() -> None:
    layer = nn.Linear(4, 4)
    x = torch.ones(5, 4, requires_grad=True)
    with record_saved_bytes(layer) as found:
        (layer(x) + layer(x)).square().sum()
    assert sum(found.values()) == 2 * 5 * 4 * 4, "the input and the sum that is squared"


@pytest.mark.parametrize(
    ("cells", "one", "free", "limit"), [(6, 10, 75, 6), (6, 10, 74, 3), (6, 10, 25, 2), (6, 10, 3, 1)]
)
def test_a_pack_may_take_four_fifths_of_what_is_free(cells: int, one: int, free: int, limit: int) -> None:
    found = compute_capacity(cells, one, free)
    assert found.max_cells == limit
    assert bool(found.reason) == (limit < cells)


def test_an_error_is_out_of_memory_if_it_says_so() -> None:
    texts = ("CUDA out of memory.", "DefaultCPUAllocator: not enough memory", "x: Can't allocate memory")
    assert all(is_out_of_memory_error(RuntimeError(text)) for text in texts)
    assert is_out_of_memory_error(MemoryError())
    assert is_out_of_memory_error(torch.OutOfMemoryError())
    assert not is_out_of_memory_error(RuntimeError("shapes differ"))
    assert not is_out_of_memory_error(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("names", "cached"),
    [
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "total_inactive_file",
        ),
    ],
)
def test_a_control_group_limits_what_is_free(
    names: tuple[str, str, str], cached: str, tmp_path: Path
) -> None:
    assert list(iterate_cgroup_free_bytes(tmp_path)) == []
    for name, text in zip(names, ("1000\n", "700\n", f"anon 600\n{cached} 100\n"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(iterate_cgroup_free_bytes(tmp_path)) == [400]
    assert measure_free_bytes("cpu") > 0
