"""Cells of a run whose teacher has a tokenizer of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd_lab import experiments
from gkd_lab.config import ConfigError
from gkd_lab.models.build import load_tokenizer
from gkd_lab.runner.cross_tokenizer import map_teacher_prompts, retokenize_completions
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.teacher_text import TEXTS_FILE
from gkd_lab.store import Store

from .tiny_experiments import contents, interrupted_at, options, table_of, tiny_grid

PIECES = {"kind": "bpe", "vocab_size": 300}
ULD = [{"type": "cross_entropy"}, {"type": "uld", "weight": 2}]
PAIR: dict[str, Any] = {"teacher_tokenizer": PIECES, "evaluations": [{"decoding": "greedy"}]}


@pytest.fixture(scope="module", autouse=True)
def silence() -> None:
    silence_libraries()


@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_cells_learn_from_a_teacher_of_other_tokens(task: str, tmp_path: Path) -> None:
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


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("straight", "cut"):
        grid = tiny_grid(tmp_path / name, "arithmetic", grid={"lmbda": [0, 1]}, objectives=ULD, **PAIR)
        outputs = tmp_path / name / "outputs"
        if name == "cut":
            with interrupted_at(3, monkeypatch):
                run_grid(grid, options(outputs))
        assert run_grid(grid, options(outputs)).failures == []
        found.append(contents(outputs))
    assert Store(outputs).get_record(grid.cells[0]).read_provenance()["resumed_at_step"] == 2
    assert found[0] == found[1]


def test_the_teacher_reads_prompts_as_it_learnt_them(tmp_path: Path) -> None:
    """The student's word tokenizer has no token for the line break that a decoder's prompt ends with."""
    from gkd_lab.runner import artifacts
    from gkd_lab.runner.train_cells import _load_examples

    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, objectives=ULD, **PAIR)
    asked, first = options(tmp_path / "outputs"), grid.cells[0].training
    teacher, student = (
        artifacts.load_artifact(artifacts.ensure_artifact(role, model, "nano", asked), model)
        for role, model in first.reference_models
    )
    found = _load_examples(first, "nano", student.tokenizer, [], asked)
    known = map_teacher_prompts(teacher.tokenizer, found, grid.cells, asked)
    assert known is not None
    assert len(known) == len({tuple(row.prompt_ids) for row in found})
    for row in found:
        text = teacher.tokenizer.decode(known[tuple(row.prompt_ids)])
        assert text.endswith("=\n")
        assert text.strip() == student.tokenizer.decode(row.prompt_ids)


def test_text_of_the_teacher_is_retold_in_the_student_s_tokens(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"method": ["seqkd", "sft"]}, **PAIR)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    (file,) = outputs.glob(f"nano/*/text-sample-*/{TEXTS_FILE}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    cell = next(one for one in grid.cells if one.labels["method"] == "seqkd")
    store = Store(outputs)
    record = store.get_record(cell)
    tokenizer = load_tokenizer(record.checkpoint)
    from gkd_lab.runner.train_cells import _load_examples

    found = _load_examples(cell.training, "nano", tokenizer, [], options(outputs))
    assert len(found) == len(lines)
    for row, line in zip(found, lines, strict=True):
        assert len(row.completion_ids) <= cell.training.max_output_tokens
        assert max(row.completion_ids, default=0) < len(tokenizer)
        told = tokenizer(line["text"])["input_ids"] + [tokenizer.eos_token_id] * line["ended"]
        assert row.completion_ids == told[: cell.training.max_output_tokens]
    assert cell.training.text_spec is not None
    text, teacher = (
        store.get_teacher_text("nano", cell.training.text_spec),
        store.get_artifact("nano", "teacher", cell.training.teacher),
    )
    assert (
        retokenize_completions(found, text, cell.training, teacher, load_tokenizer(teacher.checkpoint))
        == found
    )


def test_a_divergence_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"divergence compares .* \(bpe, 300 entries\) .*\[\{type: uld\}"):
        tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, **PAIR)
    beside = [{"beta": 0.5}, {"type": "uld"}]
    with pytest.raises(ConfigError, match=r"token by token"):
        tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0]}, objectives=beside, **PAIR)


def test_a_divergence_between_checkpoints_of_two_tokenizers_fails_with_a_way_out(tmp_path: Path) -> None:
    """What a checkpoint's tokens are shows only when it is loaded."""
    grid = tiny_grid(tmp_path / "made", "arithmetic", grid={"lmbda": [0]}, objectives=ULD, **PAIR)
    outputs = tmp_path / "made" / "outputs"
    run_grid(grid, options(outputs))
    teacher = Store(outputs).get_artifact("nano", "teacher", grid.cells[0].training.teacher).checkpoint
    loaded = {"teacher": str(teacher), "evaluations": PAIR["evaluations"]}
    refused = tiny_grid(tmp_path / "a", "arithmetic", grid={"lmbda": [0]}, **loaded)
    failed = run_grid(refused, options(tmp_path / "a" / "outputs")).failures
    assert len(failed) == 1
    record = Store(tmp_path / "a" / "outputs").get_record(refused.cells[0])
    assert "do not share a tokenizer" in record.read_status()["error"]
    assert "[{type: uld}" in record.read_status()["error"]
    accepted = tiny_grid(tmp_path / "b", "arithmetic", grid={"lmbda": [0]}, objectives=ULD, **loaded)
    assert run_grid(accepted, options(tmp_path / "b" / "outputs")).failures == []


def test_the_shipped_experiment_pairs_words_with_pieces(tmp_path: Path) -> None:
    for cell in experiments.load("cross_tokenizer", outputs=tmp_path).cells:
        kinds = cell.training.teacher.tokenizer.kind, cell.training.start.tokenizer.kind
        assert set(kinds) == {"bpe", "word"}
