"""Callbacks, optimizers and collators as a user of TRL's GKDTrainer knows them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
)
from trl.experimental.utils import DataCollatorForChatML

from ...training.scripts import chat_tokenizer, conversations, llama, logged, losses, t5, trainer, weights
from .common import HALF, OFF, ROUNDING, Make, assert_close, both

# ---- callbacks and optimizers ----


class Notes(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append("step")
        assert more["model"] is not None and more["optimizer"] is not None
        assert more["processing_class"].eos_token == "<|im_end|>"

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append("evaluate")
        assert more["metrics"]["eval_loss"] > 0

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.logs.append(dict(more["logs"]))

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append("end")


def test_callbacks_are_called_as_transformers_promises(tmp_path: Path) -> None:
    notes = Notes()
    made = trainer(
        tmp_path,
        callbacks=[notes],
        eval_dataset=conversations(2),
        arguments={
            **HALF,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    )
    made.train()
    assert notes.events == ["step", "evaluate", "step", "evaluate", "save", "end"]
    assert [{"loss", "grad_norm", "learning_rate", "epoch"} <= row.keys() for row in notes.logs[:3:2]] == [
        True,
        True,
    ]


class Stops(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_callback_can_stop_the_training(tmp_path: Path) -> None:
    made = trainer(tmp_path, callbacks=[Stops()], arguments={**HALF, "max_steps": 50})
    made.train()
    assert made.state.global_step == 2


@pytest.mark.parametrize("model", [llama, t5])
def test_early_stopping_ends_with_the_best_model(tmp_path: Path, model: Make) -> None:
    """The rate is so high that the student gets worse."""
    made = trainer(
        tmp_path,
        model=model(0),
        teacher=model(1),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_dataset=conversations(4),
        arguments={
            **OFF,
            "max_steps": 20,
            "learning_rate": 1.0,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        },
    )
    made.train()
    eval_losses = logged(made, "eval_loss")
    assert len(eval_losses) < 20 and eval_losses[-1] > min(eval_losses)
    assert made.state.best_metric == min(eval_losses)
    assert made.evaluate()["eval_loss"] == pytest.approx(min(eval_losses), rel=1e-6)


@pytest.mark.parametrize("given", ["tuple", "optim", "class"])
def test_the_optimizer_may_be_chosen(tmp_path: Path, given: str) -> None:
    student = llama(0)
    options: dict[str, Any] = {}
    if given == "tuple":
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        options["optimizers"] = (optimizer, schedule)
    if given == "class":
        options["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": 0.5})
        with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):  # TRL's takes none either
            trainer(tmp_path, model=student, **options)
        return
    arguments = {"optim": "adafactor"} if given == "optim" else {}
    made = trainer(tmp_path, model=student, arguments={**OFF, "max_steps": 3, **arguments}, **options)
    made.train()
    kind = type(getattr(made.optimizer, "optimizer", made.optimizer)).__name__
    assert kind == {"tuple": "SGD", "optim": "Adafactor"}[given]
    if given == "tuple":
        assert logged(made, "learning_rate") == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("model", [llama, t5])
def test_checkpointed_gradients_are_the_same_gradients(tmp_path: Path, model: Make) -> None:
    gradients = []
    for checkpointing in (False, True):
        made = trainer(
            tmp_path,
            model=model(0),
            teacher=model(1),
            arguments={**HALF, "learning_rate": 1e-6, "gradient_checkpointing": checkpointing},
        )
        made.train()
        assert made.model.is_gradient_checkpointing == checkpointing
        gradients.append((logged(made, "loss"), logged(made, "grad_norm")))
    for first, second in zip(*gradients, strict=True):
        assert first == pytest.approx(second, rel=ROUNDING)


# ---- collators ----


def test_the_collator_of_trl_may_be_given(tmp_path: Path) -> None:
    all_losses = []
    for collator in (None, DataCollatorForChatML(chat_tokenizer(), max_length=64)):
        made = trainer(
            tmp_path,
            data_collator=collator,
            eval_dataset=conversations(3),
            arguments={**HALF, "max_steps": 6},
        )
        made.train()
        assert set(logged(made, "on_policy")) == {0.0, 1.0}
        all_losses.append((losses(made), made.evaluate()["eval_loss"], weights(made.model)))
    assert all_losses[0][0] == pytest.approx(all_losses[1][0], rel=ROUNDING)
    assert all_losses[0][1] == pytest.approx(all_losses[1][1], rel=ROUNDING)
    assert_close(all_losses[0][2], all_losses[1][2], atol=1e-6)


def test_a_collator_need_not_state_the_prompts(tmp_path: Path) -> None:
    whole = DataCollatorForChatML(chat_tokenizer(), max_length=64)

    def without(rows: Any) -> dict[str, Tensor]:
        batch = whole(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    all_losses = []
    for collator in (whole, without):
        made = trainer(tmp_path, data_collator=collator, arguments={**HALF, "max_steps": 6})
        made.train()
        all_losses.append(losses(made))
    assert all_losses[0] == all_losses[1]


def test_our_collator_makes_the_batches_of_trl(tmp_path: Path) -> None:
    """TRL pads whole rows on the left, we pad each prompt on the left and each completion on the right."""
    made = trainer(tmp_path)
    assert made.train_dataset[3] == conversations()[3]
    ours = made.data_collator([made.train_dataset[n] for n in range(8)])
    theirs = DataCollatorForChatML(chat_tokenizer(), max_length=64)(conversations())
    assert {"input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask"} <= ours.keys()
    for name in ("prompts", "prompt_attention_mask"):
        assert torch.equal(ours[name], theirs[name])
    for n in range(8):
        rows = [(b["input_ids"][n], b["labels"][n], b["attention_mask"][n].bool()) for b in (ours, theirs)]
        for column in (0, 1):
            assert rows[0][column][rows[0][2]].tolist() == rows[1][column][rows[1][2]].tolist()
        assert (rows[0][1][~rows[0][2]] == -100).all()


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
def test_compute_loss_divides_as_trl_documents(tmp_path: Path, items: Any) -> None:
    """Every completion token counts, though the prompts differ in length."""
    theirs, ours = both(tmp_path)
    batch = theirs.data_collator(conversations())
    with torch.no_grad():
        expected = theirs.compute_loss(theirs.model, dict(batch), num_items_in_batch=items)
    loss = ours.compute_loss(ours.model, ours.data_collator(conversations()), num_items_in_batch=items)
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDING)
    assert ours.compute_loss(ours.model, batch, num_items_in_batch=items).item() == pytest.approx(
        loss.item(), rel=ROUNDING
    )
    with_outputs, _ = ours.compute_loss(ours.model, batch, return_outputs=True, num_items_in_batch=items)
    assert with_outputs.item() == pytest.approx(loss.item(), rel=ROUNDING)
