"""Runs of cells whose teacher has another tokenizer than the student."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd_lab import experiments
from gkd_lab.config import ConfigError
from gkd_lab.models.build import load_tokenizer
from gkd_lab.runner import artifacts
from gkd_lab.runner.cross_tokenizer import map_teacher_prompts, retokenize_completions
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.teacher_text import TEXTS_FILE
from gkd_lab.runner.training_inputs import load_examples
from gkd_lab.store import Store

from .tiny_experiments import contents, interrupted_at, options, table_of, tiny_grid

PIECES = {"kind": "bpe", "vocab_size": 300}
ULD = [{"type": "cross_entropy"}, {"type": "uld", "weight": 2}]
PAIR: dict[str, Any] = {"teacher_tokenizer": PIECES, "evaluations": [{"decoding": "greedy"}]}


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_cells_train_on_a_teacher_with_another_tokenizer(task: str, tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, task, grid={"lmbda": [0, 0.5, 1]}, objectives=ULD, **PAIR)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    assert {row["status"] for row in table_of(grid, outputs)} == {"done"}
    store = Store(outputs)
    for cell in grid.cells:
        for row in store.get_record(cell).read_history():
            assert row["loss/uld"] > 0
            assert row["loss"] == pytest.approx(row["loss/uld"] + row["loss/cross_entropy"], rel=1e-5)
    (teacher,) = {
        store.get_artifact("nano", "teacher", cell.training.teacher).checkpoint for cell in grid.cells
    }
    assert len(load_tokenizer(teacher)) != len(load_tokenizer(store.get_record(grid.cells[0]).checkpoint))


def test_interrupted_run_resumes_to_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_contents = []
    for name in ("straight", "cut"):
        grid = tiny_grid(tmp_path / name, "arithmetic", grid={"lmbda": [0, 1]}, objectives=ULD, **PAIR)
        outputs = tmp_path / name / "outputs"
        if name == "cut":
            with interrupted_at(3, monkeypatch):
                run_grid(grid, options(outputs))
        assert run_grid(grid, options(outputs)).failures == []
        all_contents.append(contents(outputs))
    assert Store(outputs).get_record(grid.cells[0]).read_provenance()["resumed_at_step"] == 2
    assert all_contents[0] == all_contents[1]


def test_teacher_prompts_are_in_the_teachers_tokens(tmp_path: Path) -> None:
    """The student's word tokenizer has no token for the line break that a decoder's prompt ends with."""
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, objectives=ULD, **PAIR)
    run_options, training = options(tmp_path / "outputs"), grid.cells[0].training
    teacher, student = (
        artifacts.load_artifact(artifacts.ensure_artifact(role, model, "nano", run_options), model)
        for role, model in training.reference_models
    )
    examples = load_examples(grid.cells[0], student.tokenizer, [], run_options)
    teacher_prompts = map_teacher_prompts(teacher.tokenizer, examples, grid.cells, run_options)
    assert teacher_prompts is not None
    assert len(teacher_prompts) == len({tuple(row.prompt_ids) for row in examples})
    for row in examples:
        text = teacher.tokenizer.decode(teacher_prompts[tuple(row.prompt_ids)])
        assert text.endswith("=\n")
        assert text.strip() == student.tokenizer.decode(row.prompt_ids)


def test_teacher_text_is_retokenized_for_the_student(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"method": ["seqkd", "sft"]}, **PAIR)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    (file,) = outputs.glob(f"nano/*/text-sample-*/{TEXTS_FILE}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    cell = next(cell for cell in grid.cells if cell.labels["method"] == "seqkd")
    store = Store(outputs)
    record = store.get_record(cell)
    tokenizer = load_tokenizer(record.checkpoint)

    examples = load_examples(cell, tokenizer, [], options(outputs))
    assert len(examples) == len(lines)
    for row, line in zip(examples, lines, strict=True):
        assert len(row.completion_ids) <= cell.training.max_output_tokens
        assert max(row.completion_ids, default=0) < len(tokenizer)
        expected_ids = tokenizer(line["text"])["input_ids"] + [tokenizer.eos_token_id] * line["ended"]
        assert row.completion_ids == expected_ids[: cell.training.max_output_tokens]
    assert cell.training.text_spec is not None
    text_record, teacher = (
        store.get_teacher_text("nano", cell.training.text_spec),
        store.get_artifact("nano", "teacher", cell.training.teacher),
    )
    assert (
        retokenize_completions(
            examples, text_record, cell.training, teacher, load_tokenizer(teacher.checkpoint)
        )
        == examples
    )


def test_divergence_between_tokenizers_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(bpe, 300 entries\) .*\[\{type: uld\}"):
        tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, **PAIR)
    beside = [{"beta": 0.5}, {"type": "uld"}]
    with pytest.raises(ConfigError, match=r"token by token"):
        tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, objectives=beside, **PAIR)


def test_divergence_between_checkpoint_tokenizers_fails_with_advice(tmp_path: Path) -> None:
    """The tokenizer of a checkpoint is known only once it is loaded."""
    grid = tiny_grid(tmp_path / "made", "arithmetic", grid={"lmbda": [0]}, objectives=ULD, **PAIR)
    outputs = tmp_path / "made" / "outputs"
    run_grid(grid, options(outputs))
    teacher = Store(outputs).get_artifact("nano", "teacher", grid.cells[0].training.teacher).checkpoint
    loaded = {"teacher": str(teacher), "evaluations": PAIR["evaluations"]}
    refused = tiny_grid(tmp_path / "a", "arithmetic", grid={"lmbda": [0]}, **loaded)
    failed = run_grid(refused, options(tmp_path / "a" / "outputs")).failures
    assert len(failed) == 1
    record = Store(tmp_path / "a" / "outputs").get_record(refused.cells[0])
    assert "share a tokenizer" in record.read_status()["error"]
    assert "[{type: uld}" in record.read_status()["error"]
    accepted = tiny_grid(tmp_path / "b", "arithmetic", grid={"lmbda": [0]}, objectives=ULD, **loaded)
    assert run_grid(accepted, options(tmp_path / "b" / "outputs")).failures == []


def test_shipped_experiment_has_two_tokenizers(tmp_path: Path) -> None:
    for cell in experiments.load("cross_tokenizer", outputs=tmp_path).cells:
        kinds = cell.training.teacher.tokenizer.kind, cell.training.start.tokenizer.kind
        assert set(kinds) == {"bpe", "word"}
