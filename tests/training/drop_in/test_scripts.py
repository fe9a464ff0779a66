"""What scripts and subclasses written for TRL's GKDTrainer call, read and override."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    GenerationConfig,
    TrainerCallback,
)
from trl import LogCompletionsCallback
from trl.experimental.gkd import GKDTrainer as TrlTrainer
from trl.experimental.utils import DataCollatorForChatML

from gkd_lab import GKDTrainer

from ...models.test_attention import RecordAttention
from ...training.scripts import (
    chat,
    chat_tokenizer,
    config,
    conversations,
    llama,
    logged,
    losses,
    t5,
    trainer,
)
from .common import HALF, OFF, ON, Make, lora

# ---- what scripts call on the class ----


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_generalized_jsd_loss_is_that_of_trl(
    beta: float, temperature: float, labelled: bool, reduction: str
) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 5, 11, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 11, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, -100) if labelled else None
    results = []
    for kind in (TrlTrainer, GKDTrainer):
        student_copy = student.clone().requires_grad_()
        loss = kind.generalized_jsd_loss(
            student_copy, teacher, labels, beta=beta, temperature=temperature, reduction=reduction
        )
        loss.sum().backward()
        results.append((loss, student_copy.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(7.0)])
def test_generalized_jsd_loss_divides_by_a_number_given(items: Any) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    values = [
        kind.generalized_jsd_loss(student, teacher, reduction="none", num_items_in_batch=items)
        for kind in (TrlTrainer, GKDTrainer)
    ]
    torch.testing.assert_close(values[1], values[0])
    nothing = torch.full((3, 5), -100)
    for kind in (TrlTrainer, GKDTrainer):
        assert kind.generalized_jsd_loss(student, teacher, nothing).item() == 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_generate_on_policy_outputs_are_those_of_trl(count: int) -> None:
    """Greedy, from prompts padded on the left, with no, one and two ends of sequence."""
    model = llama(5).eval()
    model.generation_config.eos_token_id = None
    inputs = DataCollatorForChatML(chat_tokenizer(), max_length=64)(conversations())
    assert (inputs["prompt_attention_mask"] == 0).any()
    settings = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0)
    width = inputs["prompts"].shape[1]
    free = GKDTrainer.generate_on_policy_outputs(model, inputs, settings)[0][:, width:]
    ends = [int(free[0, 3]), int(free[1, 5])][:count]
    settings.eos_token_id = {0: None, 1: ends[0] if ends else None, 2: ends}[count]
    theirs, ours = (
        kind.generate_on_policy_outputs(model, inputs, settings) for kind in (TrlTrainer, GKDTrainer)
    )
    for expected, actual in zip(theirs, ours, strict=True):
        assert torch.equal(expected, actual)
    lengths = ours[1][:, width:].sum(1).tolist()
    assert (min(lengths) < max(lengths)) == (count > 0)


# ---- around the training ----


class WithCrossEntropy(GKDTrainer):
    """Adds part of the usual loss on the sequence that the step trains on, as a user may."""

    seen: list[Tensor]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        self.seen.append(inputs["labels"])
        loss = super().compute_loss(model, inputs, *args, **options)
        names = ("input_ids", "attention_mask", "labels")
        return loss + 0.5 * model(**{name: inputs[name] for name in names}).loss


@pytest.mark.parametrize("model", [llama, t5])
def test_a_subclass_finds_the_tensors_of_trl_in_a_training_step(tmp_path: Path, model: Make) -> None:
    arguments = config(tmp_path, **HALF, include_num_input_tokens_seen="non_padding")
    made = WithCrossEntropy(
        model=model(0),
        teacher_model=model(1),
        args=arguments,
        train_dataset=conversations(),
        processing_class=chat_tokenizer(),
    )
    made.seen = []
    made.train()
    assert logged(made, "on_policy") == [0.0, 1.0]
    completions = [int((labels != -100).sum()) for labels in made.seen]
    assert completions == [round(2 * length) for length in logged(made, "completion_length")]
    assert made.state.num_input_tokens_seen > 0


def test_the_card_of_the_model_names_the_data_set_as_with_trl(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments=OFF)
    made.train()
    made.create_model_card(model_name="student", dataset_name="some/data", tags="gkd")
    text = (tmp_path / "README.md").read_text()
    assert "some/data" in text and "gkd" in text


def test_trls_callback_that_shows_completions_runs(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"prompt": chat("one plus two ?"), "completion": [{"role": "assistant", "content": "three"}]}] * 3
    )
    made = trainer(tmp_path, train_dataset=rows, eval_dataset=rows, arguments=HALF)
    settings = GenerationConfig(max_new_tokens=4, do_sample=False)
    shown = LogCompletionsCallback(made, settings, num_prompts=2, freq=1)
    made.add_callback(shown)
    made.train()
    assert len(shown.table) == 4  # two prompts in each of two steps


def test_sampling_leaves_the_generation_configuration_of_the_adapted_model_alone(tmp_path: Path) -> None:
    student = llama(0)
    student.generation_config.temperature, student.generation_config.max_new_tokens = 0.33, 77
    made = trainer(tmp_path, model=student, arguments=ON, peft_config=lora(task_type="CAUSAL_LM"))
    made.train()
    configuration = made.model.merge_and_unload().generation_config
    assert (configuration.temperature, configuration.max_new_tokens) == (0.33, 77)


class Annealed(TrainerCallback):
    """Turns the student's own text on after the first step, and the other way round for beta."""

    trainer: Any = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.lmbda, self.trainer.beta = 1.0, 0.0


def test_a_callback_may_set_lmbda_beta_and_temperature_on_the_trainer(tmp_path: Path) -> None:
    callback = Annealed()
    made = trainer(tmp_path, arguments=OFF, callbacks=[callback])
    callback.trainer = made
    assert (made.lmbda, made.beta, made.temperature) == (0.0, 0.5, 0.9)
    made.train()
    assert logged(made, "on_policy") == [0.0, 1.0]
    assert (made.cells[0].lmbda, made.cells[0].beta) == (1.0, 0.0)


class TrlStyle(GKDTrainer):
    """A loss as a subclass of TRL's trainer writes it."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student, teacher = (m(**ids).logits[:, :-1] for m in (model, self.teacher_model))
        loss = self.generalized_jsd_loss(
            student,
            teacher,
            inputs["labels"][:, 1:],
            beta=self.beta,
            num_items_in_batch=num_items_in_batch,
        )
        return (loss, {}) if return_outputs else loss


def test_a_subclass_may_write_its_loss_as_with_trl(tmp_path: Path) -> None:
    ours = trainer(tmp_path, arguments=HALF)
    theirs = TrlStyle(
        model=llama(0),
        teacher_model=llama(1, width=24),
        args=config(tmp_path, **HALF),
        train_dataset=conversations(),
        processing_class=chat_tokenizer(),
    )
    for made in (ours, theirs):
        made.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-4)


def test_a_batch_that_is_too_large_for_the_memory_is_halved(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        arguments={**OFF, "auto_find_batch_size": True, "per_device_train_batch_size": 8},
    )
    step = made.training_step

    def with_room_for_two(model: Any, inputs: Any, *more: Any) -> Any:
        if inputs["batch"].student.num_rows > 2:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *more)

    made.training_step = with_room_for_two
    made.train()
    assert len(losses(made)) == 2


def test_a_subclass_may_log_a_loss_of_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments={**OFF, "logging_steps": 100})
    made.train()
    made.log({"loss": 1.0})
    assert losses(made) == [1.0]


def test_in_bfloat16_on_a_cpu_attention_stays_in_float32(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=conversations(2), arguments={**HALF, "bf16": True})
    with RecordAttention() as recorded:
        made.train()
        made.evaluate()
    assert logged(made, "on_policy") == [0.0, 1.0]
    assert recorded.queries == {torch.float32}
