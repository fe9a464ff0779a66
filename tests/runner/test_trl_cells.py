"""Cells with `implementation: trl`: TRL's step on our rows, in a record like any other."""

import random
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer
from trl.experimental.utils import DataCollatorForChatML

from gkd_lab.config import Cell, Grid
from gkd_lab.encoding.batches import Example
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.training_inputs import load_sft_student, load_teacher
from gkd_lab.runner.trl_trainer import TrlCellTrainer, build_trl_rows, build_trl_trainer, load_uncut_examples
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from .tiny_experiments import contents, interrupted_at, options, table_of, tiny_grid

TRL: dict[str, Any] = {
    "implementation": "trl",
    "max_output_tokens": 40,
    "grid": {"lmbda": [0, 0.5, 1], "beta": [0, 1], "seed": [3]},
    "eval_every": 2,
    "eval_rows": 4,
    "evaluations": [{"decoding": "greedy"}, {"decoding": "greedy", "checkpoint": "best"}],
}


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


def read_losses(cell: Cell, store: Store) -> list[float]:
    return [row["loss"] for row in store.get_record(cell).read_history()]


def build_trainer_of(cell: Cell, outputs: Path) -> TrlCellTrainer:
    """Build the trainer of a cell as a run does, its models made first."""
    run_options = options(outputs)
    student, record = load_sft_student(cell, run_options), run_options.store.get_record(cell)
    examples = load_uncut_examples(cell, student.tokenizer, record, run_options)
    teacher = load_teacher(cell, run_options)
    return build_trl_trainer(student.model, teacher, examples, cell, run_options, student.tokenizer)


# ---- what a cell is ----


def test_a_cell_of_trl_leaves_the_record_of_any_cell_and_never_shares_a_model(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **TRL)
    store = Store(tmp_path / "outputs")
    assert run_grid(grid, options(store.root)).failures == []
    for cell in grid.cells:
        record = store.get_record(cell)
        status = record.read_status()
        assert (status["state"], status["steps"], status["shared_by"]) == ("done", 4, 1)
        assert status["tokens"] > 0
        provenance = record.read_provenance()
        assert provenance["pack"] == [cell.fingerprint]
        assert provenance["pack_limit"] == "alone: TRL's trainer trains one student"
        assert [row["step"] for row in record.read_history()] == [2, 4]
        assert [row["step"] for row in record.read_selection()] == [2, 4]
        names = {"step", "loss", "grad_norm", "on_policy", "completion_length", "truncated", "learning_rate"}
        assert {name for row in record.read_history() for name in row} == names
        for folder in (record.checkpoint, record.best_checkpoint):
            assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
        assert {e.name for e in cell.evaluations} == {"greedy", "greedy+best"}
        assert all(record.get_evaluation(e).read_state() == "done" for e in cell.evaluations)
        assert not record.steps_folder.exists()
        shares = [row["on_policy"] for row in record.read_history()]
        assert shares == {0: [0, 0], 1: [1, 1]}.get(cell.lmbda, shares)
    table = build_long_table(grid, store)
    assert set(table[table["role"] == "cell"]["status"]) == {"done"}


def test_without_sampling_trl_trains_as_our_mean_over_tokens(tmp_path: Path) -> None:
    """The rows, their order, optimizer and schedule are the same; only the normalization differs."""
    changes = {**TRL, "grid": {"beta": [0, 0.5, 1], "seed": [3, 4]}, "lmbda": 0, "steps": 12}
    losses, weights = {}, {}
    for name, settings in {
        "trl": {"implementation": "trl"},
        "token": {"implementation": "gkd_lab", "loss_normalization": "token"},
        "sequence": {"implementation": "gkd_lab"},
    }.items():
        grid = tiny_grid(tmp_path, "arithmetic", name=name, **{**changes, **settings})
        store = Store(tmp_path / "outputs")
        assert run_grid(grid, options(store.root)).failures == []
        losses[name] = [loss for cell in grid.cells for loss in read_losses(cell, store)]
        files = [store.get_record(cell).checkpoint / "model.safetensors" for cell in grid.cells]
        weights[name] = [torch.cat([w.flatten() for w in load_file(file).values()]) for file in files]
    assert losses["trl"] == pytest.approx(losses["token"], rel=1e-5, abs=1e-7)
    assert losses["trl"] != pytest.approx(losses["sequence"], rel=1e-3, abs=1e-6)
    for trl, token in zip(weights["trl"], weights["token"], strict=True):
        torch.testing.assert_close(trl, token, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adafactor"},
        {"precision": "fp64"},
        {"precision": "bf16"},
        {"weight_decay": 0.5, "max_grad_norm": 0.1},
        {"train_rows": 12},
    ],
)
def test_settings_of_the_training_act_on_trl_as_on_ours(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {**TRL, "grid": {"beta": [1], "seed": [3]}, "lmbda": 0, "steps": 8, **settings}
    trl = tiny_grid(tmp_path, "arithmetic", name="trl", **changes)
    ours = {"implementation": "gkd_lab", "loss_normalization": "token"}
    token = tiny_grid(tmp_path, "arithmetic", name="token", **{**changes, **ours})
    store = Store(tmp_path / "outputs")
    for grid in (trl, token):
        assert run_grid(grid, options(store.root)).failures == []
    losses, expected = (read_losses(grid.cells[0], store) for grid in (trl, token))
    # bf16: TRL rounds the divergence too, ours is fp32.
    tolerance = 0.02 if settings.get("precision") == "bf16" else 1e-5
    assert losses == pytest.approx(expected, rel=tolerance)


def test_evaluations_during_training_change_neither_coins_nor_samples(tmp_path: Path) -> None:
    changes = {**TRL, "grid": {"lmbda": [0.5], "seed": [3]}, "steps": 8}
    without = {**changes, "eval_every": None, "eval_rows": None, "evaluations": [{"decoding": "greedy"}]}
    store, histories = Store(tmp_path / "outputs"), []
    for name, document in (("with", changes), ("without", without)):
        grid = tiny_grid(tmp_path, "arithmetic", name=name, **document)
        assert run_grid(grid, options(store.root)).failures == []
        histories.append(store.get_record(grid.cells[0]).read_history())
    assert histories[0] == histories[1]


# ---- whose step it is ----


def test_coin_sampling_and_loss_are_those_of_trls_trainer(tmp_path: Path) -> None:
    """Run TRL's plain trainer on the same batches: losses and weights are equal to the bit."""
    changes = {**TRL, "grid": {"lmbda": [0.5], "beta": [0.5], "seed": [3]}, "steps": 8}
    (cell,) = tiny_grid(tmp_path, "arithmetic", **changes).cells
    ours = build_trainer_of(cell, tmp_path / "outputs")
    ours.train()
    order = chain.from_iterable(ours.get_train_dataloader().batch_sampler)
    rows = ours.train_dataset.select(order)
    student, teacher = (
        load(cell, options(tmp_path / "outputs")) for load in (load_sft_student, load_teacher)
    )
    arguments = replace(ours.args, train_sampling_strategy="sequential", output_dir=str(tmp_path / "plain"))
    plain = TrlGKDTrainer(
        model=student.model,
        teacher_model=teacher.model,
        args=arguments,
        train_dataset=rows,
        processing_class=student.tokenizer,
    )
    plain.train()
    losses = [
        [row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (ours, plain)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    state = plain.model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in ours.model.state_dict().items())
    coin = random.Random(cell.seed)
    tosses = [coin.random() <= 0.5 for _ in range(8)]
    store = Store(tmp_path / "outputs")
    shares = [row["on_policy"] for row in store.get_record(cell).read_history()]
    assert shares == [sum(tosses[n : n + 2]) / 2 for n in (0, 2, 4, 6)]


def test_the_loss_of_sampled_text_is_divided_by_the_tokens_of_the_references(tmp_path: Path) -> None:
    """Pitfall 1 of TRL, which the arm is there to show: references half as long double the loss."""
    changes = {**TRL, "grid": {"lmbda": [1], "seed": [3]}, "steps": 2}
    (cell,) = tiny_grid(tmp_path, "arithmetic", **changes).cells
    run_options = replace(options(tmp_path / "outputs"), log_every=1)
    student, teacher = load_sft_student(cell, run_options), load_teacher(cell, run_options)
    record = run_options.store.get_record(cell)
    examples = load_uncut_examples(cell, student.tokenizer, record, run_options)
    for length in (8, 4):
        cut = [replace(example, completion_ids=example.completion_ids[:length]) for example in examples]
        model = load_sft_student(cell, run_options).model
        build_trl_trainer(model, teacher, cut, cell, run_options, student.tokenizer).train()
    long, _, short, _ = record.read_history()
    assert long["completion_length"] == short["completion_length"] > 8
    assert short["loss"] == pytest.approx(2 * long["loss"])


def test_sampled_rows_that_end_with_the_id_0_are_not_truncated(tmp_path: Path) -> None:
    (cell,) = tiny_grid(tmp_path, "arithmetic", **{**TRL, "grid": {"seed": [3]}}).cells
    trainer = build_trainer_of(cell, tmp_path / "outputs")
    trainer.generation_config.eos_token_id = 0
    trainer._record_step(torch.tensor(1.0), torch.tensor([[-100, 5, 0], [-100, 5, 6]]), is_on_policy=True)
    (row,) = trainer.metrics.pop_means()
    assert row["truncated"] == 0.5


@pytest.mark.parametrize("n_cut", [0, 1, 2])
def test_rows_are_cut_as_trls_collator_cuts_texts(n_cut: int, tmp_path: Path) -> None:
    (cell,) = tiny_grid(tmp_path, "arithmetic", **{**TRL, "grid": {"seed": [3]}}).cells
    run_options = options(tmp_path / "outputs")
    tokenizer = load_sft_student(cell, run_options).tokenizer
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    texts = [("1 + 2 + 3 = \n", "3 6 "), ("4 + 5 = \n", "9 "), ("7 = \n", "7 7 7 7 ")]
    chats, examples = [], []
    for prompt, target in texts:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
        chats.append({"messages": messages})
        prompt_ids, ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + target)
        )
        examples.append(Example(prompt_ids, ids[len(prompt_ids) :]))
    longest = max(len(example.prompt_ids + example.completion_ids) for example in examples)
    max_length = longest - n_cut
    collate = DataCollatorForChatML(tokenizer, max_length=max_length)
    expected, batch = collate(chats), collate(build_trl_rows(examples, max_length))
    for name in ("input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask"):
        assert torch.equal(expected[name], batch[name]), name
    assert batch["input_ids"].shape[1] == max_length


# ---- interrupted and failed ----


def test_an_interrupted_cell_of_trl_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coins, samples and selection too: 12 rows are an epoch of three steps."""
    changes = {**TRL, "grid": {"lmbda": [0.5, 1], "seed": [3]}, "steps": 8, "train_rows": 12}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    run_grid(grid, options(tmp_path / "whole"))
    with interrupted_at(5, monkeypatch, TrlCellTrainer):
        run_grid(grid, options(tmp_path / "resumed"))
    run_grid(grid, options(tmp_path / "resumed"))
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    store = Store(tmp_path / "resumed")
    assert store.get_record(grid.cells[0]).read_provenance()["resumed_at_step"] == 4


def run_and_read_failure(grid: Grid, outputs: Path) -> dict[str, Any]:
    """Run a grid whose only cell fails; return its status."""
    outcome = run_grid(grid, options(outputs))
    (cell,) = grid.cells
    record = Store(outputs).get_record(cell)
    assert len(outcome.failures) == 1 and str(record.status_file) in outcome.failures[0]
    assert [row["status"] for row in table_of(grid, outputs) if row["role"] == "cell"] == ["failed"]
    return record.read_status()


def test_an_error_of_trls_is_a_failed_record_with_its_traceback(tmp_path: Path) -> None:
    """TRL's collator refuses a row whose completion alone fills the window."""
    changes = {**TRL, "grid": {"seed": [3]}, "max_input_tokens": 4, "max_output_tokens": 2}
    status = run_and_read_failure(tiny_grid(tmp_path, "arithmetic", **changes), tmp_path / "outputs")
    assert status["state"] == "failed"
    assert status["error"].startswith("ValueError: An example has no prompt tokens left")
    assert "trl/experimental/utils.py" in status["traceback"]


def test_a_teacher_with_another_number_of_logits_is_refused_by_trl(tmp_path: Path) -> None:
    """The spec of a hub model does not say how many rows its head is padded to."""
    (cell,) = tiny_grid(tmp_path, "arithmetic", **{**TRL, "grid": {"seed": [3]}}).cells
    run_options = options(tmp_path / "outputs")
    student, teacher = load_sft_student(cell, run_options), load_teacher(cell, run_options)
    teacher.model.resize_token_embeddings(64, mean_resizing=False)
    record = run_options.store.get_record(cell)
    examples = load_uncut_examples(cell, student.tokenizer, record, run_options)
    with pytest.raises(ValueError, match="teacher model has vocab_size 64"):
        build_trl_trainer(student.model, teacher, examples, cell, run_options, student.tokenizer)


def test_a_loss_that_is_not_finite_fails_the_cell(tmp_path: Path) -> None:
    changes = {**TRL, "grid": {"seed": [3]}, "lmbda": 0, "learning_rate": 1e30}
    status = run_and_read_failure(tiny_grid(tmp_path, "arithmetic", **changes), tmp_path / "outputs")
    assert status["error"].startswith("FloatingPointError: the ") and " at step " in status["error"]


def test_out_of_memory_is_not_answered_by_more_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL would toss a coin for each of them, which is another training."""
    grid = tiny_grid(tmp_path, "arithmetic", **{**TRL, "grid": {"seed": [3]}})

    def exhaust_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrlCellTrainer, "training_step", exhaust_memory)
    assert "out of memory" in run_and_read_failure(grid, tmp_path / "outputs")["error"]
