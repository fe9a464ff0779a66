"""Students with LoRA in experiments: trained, evaluated, resumed and exported, for both kinds of models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from gkd_lab.config import Cell, ConfigError, Grid
from gkd_lab.runner.dataset import encode_examples, load_split
from gkd_lab.runner.lm_eval_runs import evaluate_record
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.student_files import export_record, load_student
from gkd_lab.runner.train_cells import load_trained_pack
from gkd_lab.store import Record, Store

from ..models.tiny import tiny_model, tiny_tokenizer
from .tiny_experiments import contents, interrupted_at, options, table_of, tiny_grid

peft = pytest.importorskip("peft")
TARGETS = {"arithmetic": ["q_proj", "v_proj"], "translation": ["q", "v"]}
SIZES = {"layers": 1, "width": 8, "heads": 2, "sft": {"steps": 4}}


def lora_grid(folder: Path, task: str, **changes: Any) -> Grid:
    """A cell with all weights trained and one with an adapter, at a rate that moves four steps far."""
    adapted = {**SIZES, "lora": {"r": 2, "alpha": 8, "targets": TARGETS[task]}}
    fields = {"grid": {"student": [SIZES, adapted], "lmbda": [0.5]}, "learning_rate": 0.1, **changes}
    return tiny_grid(folder, task, **fields)


@pytest.fixture(scope="module", params=sorted(TARGETS))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Store]:
    """A finished run that also selects checkpoints; its second cell has an adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    evaluations = [{"decoding": "greedy"}, {"decoding": "greedy", "checkpoint": "best"}]
    grid = lora_grid(folder, request.param, eval_every=2, eval_rows=4, evaluations=evaluations)
    store = Store(folder / "outputs")
    outcome = run_grid(grid, options(store.root))
    assert not outcome.failures
    return grid, store


def get_auto_class(cell: Cell) -> Any:
    is_encoder_decoder = cell.training.start.family == "encoder-decoder"
    return AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM


def compute_logits(model: Any) -> Tensor:
    ids = torch.arange(3, 13)[None]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids, **extra).logits
    return logits


def load_base(cell: Cell, store: Store) -> Any:
    return get_auto_class(cell).from_pretrained(store.get_sft_student(cell).checkpoint)


def test_only_the_adapter_trains_on_the_shared_sft_student(finished: tuple[Grid, Store]) -> None:
    grid, store = finished
    whole, cell = grid.cells
    assert whole.training.start == cell.training.start
    record = store.get_record(cell)
    weights = load_file(record.checkpoint / "adapter_model.safetensors")
    config = json.loads((record.checkpoint / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 8, TARGETS[cell.task])
    assert {name.split(".")[-3] for name in weights} == set(TARGETS[cell.task])
    assert all(bool(tensor.any()) for tensor in weights.values())  # each lora_B began at 0
    assert not (record.checkpoint / "model.safetensors").exists()
    assert (store.get_record(whole).checkpoint / "model.safetensors").exists()
    base = store.root / config["base_model_name_or_path"]
    assert base == store.get_sft_student(cell).checkpoint
    assert {row["status"] for row in table_of(grid, store.root)} == {"done"}


def test_cells_with_an_adapter_train_alone_and_say_why(finished: tuple[Grid, Store]) -> None:
    grid, store = finished
    provenance = store.get_record(grid.cells[1]).read_provenance()
    assert provenance["pack"] == [grid.cells[1].fingerprint]
    assert "LoRA" in provenance["pack_limit"]


def test_evaluations_generate_with_the_adapter_active(finished: tuple[Grid, Store]) -> None:
    grid, store = finished
    cell = grid.cells[1]
    record = store.get_record(cell)
    pack, tokenizer = load_trained_pack([cell], options(store.root))
    assert any("lora_" in name for name, _ in pack.model.named_parameters())
    adapted = peft.PeftModel.from_pretrained(load_base(cell, store), record.checkpoint)
    assert torch.equal(compute_logits(pack.model), compute_logits(adapted))
    assert not torch.allclose(compute_logits(adapted), compute_logits(load_base(cell, store)), atol=1e-3)
    start, evaluation = cell.training.start, cell.evaluations[0]
    rows = load_split(cell.task, cell.training.data, "test", store.root / ".cache")
    examples, _ = encode_examples(start, tokenizer, rows)
    texts = []
    for example in examples:
        ids = torch.tensor([example.prompt_ids])
        output = adapted.generate(input_ids=ids, do_sample=False, max_new_tokens=start.max_output_tokens)
        new_ids = output[0, 1 if start.family == "encoder-decoder" else ids.shape[1] :]
        texts.append(tokenizer.decode(new_ids, skip_special_tokens=True).strip())
    predictions = record.get_evaluation(evaluation).read_prediction_rows()
    assert [row["prediction"].strip() for row in predictions] == texts
    start_rows = store.get_sft_student(cell).get_evaluation(evaluation).read_prediction_rows()
    assert [row["prediction"].strip() for row in start_rows] != texts


def test_the_best_checkpoint_is_an_adapter_too(finished: tuple[Grid, Store]) -> None:
    grid, store = finished
    record = store.get_record(grid.cells[1])
    rows = record.read_selection()
    metric = next(name for name in rows[0] if name != "step")
    last, best = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (record.checkpoint, record.best_checkpoint)
    )
    is_last = rows[1][metric] > rows[0][metric]
    assert all(torch.equal(last[name], best[name]) for name in last) == is_last


def test_exports_compute_what_the_record_does(finished: tuple[Grid, Store], tmp_path: Path) -> None:
    grid, store = finished
    cell = grid.cells[1]
    record, auto_class = store.get_record(cell), get_auto_class(cell)
    expected = compute_logits(load_student(record, cell.training.start, "fp32"))
    export_record(record, tmp_path / "adapter")
    export_record(record, tmp_path / "merged", merged=True)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert Path(config.base_model_name_or_path) == store.get_sft_student(cell).checkpoint.resolve()
    auto_peft = getattr(peft, auto_class.__name__.replace("Auto", "AutoPeft"))
    assert torch.equal(compute_logits(auto_peft.from_pretrained(tmp_path / "adapter")), expected)
    assert torch.equal(compute_logits(auto_class.from_pretrained(tmp_path / "adapter")), expected)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = auto_class.from_pretrained(tmp_path / "merged")
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(compute_logits(merged), expected, rtol=1e-5, atol=1e-5)
    for name in ("adapter", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(record.checkpoint).get_vocab()


def test_the_best_checkpoint_and_whole_models_are_exported(
    finished: tuple[Grid, Store], tmp_path: Path
) -> None:
    grid, store = finished
    whole, cell = grid.cells
    export_record(store.get_record(cell), tmp_path / "best", is_best=True)
    best = store.get_record(cell).best_checkpoint / "adapter_model.safetensors"
    assert (tmp_path / "best" / best.name).read_bytes() == best.read_bytes()
    for n, record in enumerate((store.get_record(whole), store.get_sft_student(cell))):
        export_record(record, tmp_path / f"whole-{n}")
        files = {path.name: path.read_bytes() for path in record.checkpoint.iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / f"whole-{n}").iterdir()} == files


def test_exports_that_cannot_be_are_refused(finished: tuple[Grid, Store], tmp_path: Path) -> None:
    grid, store = finished
    whole, cell = map(store.get_record, grid.cells)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    copied = Record(shutil.copytree(cell.folder, tmp_path / "nano" / "task" / cell.folder.name))
    copied.status_file.rename(tmp_path / "status.json")
    requests: list[tuple[str, Record, str, dict[str, bool]]] = [
        ("--merged", whole, "new", {"merged": True}),
        ("taken", cell, "taken", {}),
        ("missing", copied, "new", {}),
        ("best", store.get_sft_student(grid.cells[0]), "new", {"is_best": True}),
    ]
    for message, record, name, changes in requests:
        with pytest.raises(ConfigError, match=message):
            export_record(record, tmp_path / name, **changes)
    (tmp_path / "status.json").rename(copied.status_file)
    with pytest.raises(ConfigError, match="SFT student"):  # which was not copied with it
        export_record(copied, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_records_can_be_moved(finished: tuple[Grid, Store], tmp_path: Path) -> None:
    grid, store = finished
    moved = Store(shutil.copytree(store.root, tmp_path / "elsewhere"))
    record = moved.get_record(grid.cells[1])
    export_record(record, tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_relative_to(moved.root.resolve())
    outcome = run_grid(grid, options(moved.root))
    assert not outcome.failures


def test_lm_eval_reads_a_student_with_its_adapter(finished: tuple[Grid, Store]) -> None:
    pytest.importorskip("lm_eval")
    grid, store = finished
    cell = grid.cells[1]
    record = store.get_record(cell)
    results = evaluate_record(record, ["own"], options(store.root))
    (result,) = (result for result in results if "best" not in result.evaluation.name)
    stored = record.get_evaluation(cell.evaluations[0]).read_prediction_rows()
    rows = result.record.read_prediction_rows()
    assert [row["prediction"].split() for row in rows] == [row["prediction"].split() for row in stored]


@pytest.mark.parametrize("task", ["arithmetic", pytest.param("translation", marks=pytest.mark.slow)])
def test_an_interrupted_run_equals_an_undisturbed_one(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = {**SIZES, "lora": {"r": 2, "targets": TARGETS[task], "dropout": 0.2}}
    grid = lora_grid(tmp_path, task, student=student, grid={"lmbda": [1]}, eval_every=2, eval_rows=4)
    whole, resumed = Store(tmp_path / "whole"), Store(tmp_path / "resumed")
    run_grid(grid, options(whole.root))
    with interrupted_at(3, monkeypatch):
        run_grid(grid, options(resumed.root))
    steps = resumed.get_record(grid.cells[0]).steps_folder
    assert (steps / "checkpoint-2" / "adapter_model.safetensors").exists()
    run_grid(grid, options(resumed.root))
    assert resumed.get_record(grid.cells[0]).read_provenance()["resumed_at_step"] == 2
    assert contents(resumed.root) == contents(whole.root)


@pytest.mark.slow
def test_a_training_that_ended_before_its_export_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = lora_grid(tmp_path, "arithmetic", student={**SIZES, "lora": {}}, grid={"lmbda": [0]})
    whole, resumed = Store(tmp_path / "whole"), Store(tmp_path / "resumed")
    run_grid(grid, options(whole.root))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gkd_lab.runner.train_cells.save_student", _interrupt)
        run_grid(grid, options(resumed.root))
    run_grid(grid, options(resumed.root))
    assert resumed.get_record(grid.cells[0]).read_provenance()["resumed_at_step"] == 4
    assert contents(resumed.root) == contents(whole.root)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_target_that_a_loaded_student_lacks_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    tiny_model("decoder-only", 0, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    student = {"pretrained": str(folder), "sft": {"steps": 2}, "lora": {"targets": ["q_prj"]}}
    grid = tiny_grid(tmp_path, "arithmetic", student=student, grid={"lmbda": [0]})
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        run_grid(grid, options(tmp_path / "outputs"))
    assert not list((tmp_path / "outputs").glob("nano/*/*/spec.json"))


@pytest.mark.slow
def test_double_precision_and_every_layer_train_too(tmp_path: Path) -> None:
    student = {**SIZES, "lora": {"r": 2}}
    grid = tiny_grid(tmp_path, "arithmetic", student=student, grid={"lmbda": [1]}, precision="fp64")
    store = Store(tmp_path / "outputs")
    assert not run_grid(grid, options(store.root)).failures
    weights = load_file(store.get_record(grid.cells[0]).checkpoint / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float64}
    assert len(weights) == 2 * 7


@pytest.mark.slow
def test_dropout_of_the_adapter_is_on_while_it_trains(tmp_path: Path) -> None:
    adapters = [{"r": 2, "dropout": dropout} for dropout in (0, 0.5)]
    students = [{**SIZES, "lora": adapter} for adapter in adapters]
    grid = lora_grid(tmp_path, "arithmetic", grid={"student": students, "lmbda": [0]})
    store = Store(tmp_path / "outputs")
    assert not run_grid(grid, options(store.root)).failures
    records = [store.get_record(cell) for cell in grid.cells]
    losses = [[row["loss"] for row in record.read_history()] for record in records]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_an_adapter_trains_with_trl_too(tmp_path: Path) -> None:
    student = {**SIZES, "lora": {"r": 2, "targets": TARGETS["arithmetic"]}}
    changes = {"teacher_temperature": 1, "student_temperature": 1, "implementation": "trl"}
    grid = lora_grid(tmp_path, "arithmetic", student=student, grid={"lmbda": [0]}, **changes)
    store = Store(tmp_path / "outputs")
    assert not run_grid(grid, options(store.root)).failures
    weights = load_file(store.get_record(grid.cells[0]).checkpoint / "adapter_model.safetensors")
    assert len(weights) == 4 and all(bool(tensor.any()) for tensor in weights.values())
