"""The base of a PEFT student as its teacher: the adapter off, and no second copy of the weights."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from gkd_lab import GKDTrainer
from gkd_lab.teachers.teacher import Teacher

from ..scripts import llama, losses, t5, trainer, weights
from .common import HALF, OFF, ON, Make, assert_same, lora


class GradientRecorder(TrainerCallback):
    """Keeps the gradient of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def student(model: Make, dropout: float = 0.0, **changes: Any) -> Any:
    """A float64 model with an adapter that changes it."""
    torch.manual_seed(0)
    settings = lora(init_lora_weights=False, lora_dropout=dropout, **changes)
    return peft.get_peft_model(model(0, dropout=dropout).double(), settings).double()


def run(folder: Path, model: Any, teacher: Any, **arguments: Any) -> tuple[GKDTrainer, GradientRecorder]:
    recorder = GradientRecorder()
    settings = {"learning_rate": 1e-2, "max_steps": 3, **arguments}
    made = trainer(folder, model=model, teacher=teacher, arguments=settings, callbacks=[recorder])
    made.train()
    return made, recorder


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lmbda", [OFF, ON], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("model", [llama, t5])
def test_the_base_teaches_as_a_deep_copy_of_it_would(
    model: Make, lmbda: dict[str, float], checkpointing: bool, tmp_path: Path
) -> None:
    """With dropout in the student alone; the layers trained whole (`modules_to_save`) are the base's too."""
    whole = "lm_head"
    settings = {**lmbda, "gradient_checkpointing": checkpointing, "disable_dropout": False}

    def build() -> Any:
        return student(model, dropout=0.3, modules_to_save=[whole])

    first, second = build(), build()
    shared, shared_gradients = run(tmp_path, first, first.get_base_model(), **settings)
    copied, copied_gradients = run(tmp_path, second, model(0, dropout=0.3).double(), **settings)
    assert shared.teacher_model is first.get_base_model()
    assert losses(shared) == pytest.approx(losses(copied), abs=1e-9)
    assert min(losses(shared)) > 1e-3
    for one, other in zip(shared_gradients.steps, copied_gradients.steps, strict=True):
        assert one.keys() == other.keys()
        assert all("lora_" in name or f"{whole}.modules_to_save" in name for name in one)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-9)
    for name, value in weights(first).items():
        torch.testing.assert_close(value, weights(second)[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("share", ["get_base_model", "the model that PEFT changed", "base_model"])
def test_the_adapter_learns_and_the_base_stays(share: str, tmp_path: Path) -> None:
    base = llama(0)
    model = peft.get_peft_model(base, lora(init_lora_weights=False))
    teacher = {"get_base_model": model.get_base_model(), "base_model": model.base_model}.get(share, base)
    before = weights(model)
    made, _ = run(tmp_path, model, teacher, **HALF)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert made.teacher_model is base


def test_seq_kd_lets_the_base_write(tmp_path: Path) -> None:
    first, second = student(llama), student(llama)
    shared, _ = run(tmp_path, first, first.get_base_model(), **OFF, seq_kd=True)
    copied, _ = run(tmp_path, second, llama(0).double(), **OFF, seq_kd=True)
    texts = shared.teacher_completions.completion_cache
    assert texts
    assert texts == copied.teacher_completions.completion_cache
    assert losses(shared) == pytest.approx(losses(copied), abs=1e-9)


def test_evaluation_and_gradients_of_terms_read_the_base(tmp_path: Path) -> None:
    first, second = student(llama), student(llama)
    settings = {**HALF, "log_term_gradients": True, "eval_on_policy": True}
    results = []
    for model, teacher in ((first, first.get_base_model()), (second, llama(0).double())):
        made, _ = run(tmp_path, model, teacher, **settings)
        metrics = made.evaluate(made.train_dataset)
        norms = [row["grad_norm/divergence"] for row in made.state.log_history if "loss" in row]
        results.append([metrics["eval_loss"], metrics["eval_on_policy_loss"], *norms])
    assert results[0] == pytest.approx(results[1], abs=1e-9)


def test_a_resumed_run_equals_a_straight_one(tmp_path: Path) -> None:
    settings = {**HALF, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    first, second = student(llama), student(llama)
    run(tmp_path, first, first.get_base_model(), **settings)
    made = trainer(tmp_path, model=second, teacher=second.get_base_model(), arguments=settings)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(second), weights(first))


def test_the_base_is_one_of_several_teachers(tmp_path: Path) -> None:
    objectives = [{"beta": 0.1}, {"beta": 0.9, "teacher": 1}]
    results = []
    for is_shared in (True, False):
        model = student(llama)
        second = model.get_base_model() if is_shared else llama(0).double()
        made = trainer(
            tmp_path,
            model=model,
            teacher=llama(1).double(),
            arguments={**HALF, "objectives": objectives},
            more_teachers=[Teacher(second)],
        )
        made.train()
        results.append(losses(made))
    assert results[0] == pytest.approx(results[1], abs=1e-9)


@pytest.mark.parametrize("adapter", [peft.IA3Config, peft.LoHaConfig, peft.OFTConfig, peft.VeraConfig])
def test_other_adapters_are_turned_off_too(adapter: Any, tmp_path: Path) -> None:
    options = {"feedforward_modules": []} if adapter is peft.IA3Config else {}
    options |= {"oft_block_size": 4} if adapter is peft.OFTConfig else {}
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(0), adapter(target_modules=["q_proj", "v_proj"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # most adapters begin without an effect
                parameter.add_(0.3 * torch.randn_like(parameter))
    other = copy.deepcopy(model)
    shared, _ = run(tmp_path, model, model.get_base_model(), **OFF)
    copied, _ = run(tmp_path, other, llama(0), **OFF)
    assert losses(shared) == losses(copied)
    assert min(losses(shared)) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"park_teacher": True}, "park_teacher=True would move weights of the student"),
        ({"teacher_dtype": "bfloat16"}, "teacher_dtype='bfloat16' would cast the student"),
    ],
)
def test_what_would_change_the_student_is_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = student(llama)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model, teacher=model.get_base_model(), arguments=arguments)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_changes_its_base_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(0), lora(**changes))
    with pytest.raises(ValueError, match="does not give it back"):
        trainer(tmp_path, model=model, teacher=model.get_base_model())


def shares_embeddings(model: Any) -> Any:
    """A model of its own but for the embeddings, which are the student's."""
    other = llama(1)
    other.set_input_embeddings(model.get_base_model().get_input_embeddings())
    return other


def wraps_the_same_base(model: Any) -> Any:
    return peft.PeftModel(model.get_base_model(), lora(), "another")


@pytest.mark.parametrize("share", [shares_embeddings, wraps_the_same_base])
def test_any_other_shared_weight_is_refused(share: Any, tmp_path: Path) -> None:
    model = student(llama)
    with pytest.raises(ValueError, match=r"shares .* weights with the student"):
        trainer(tmp_path, model=model, teacher=share(model))
