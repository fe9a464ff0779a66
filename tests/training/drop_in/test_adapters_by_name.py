"""Students and teachers that PEFT's users bring: saved adapters by name, frozen models, shared weights."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from ..scripts import chat_tokenizer, llama, losses, saved, trainer, weights
from .common import lora


def save_adapter(folder: Path, seed: int = 0) -> tuple[str, str]:
    """Save a base and an adapter that changes it, each with the tokenizer; return both folders."""
    base = saved(llama(seed), folder / "base", chat_tokenizer())
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(init_lora_weights=False))
    return base, saved(model, folder / "adapter", chat_tokenizer())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.arange(2, 8)[None]).logits
        return result


def test_a_saved_adapter_is_a_teacher_by_name(tmp_path: Path) -> None:
    _, adapter = save_adapter(tmp_path, seed=1)
    made = trainer(tmp_path, teacher=adapter, arguments={"lmbda": 0.0})
    expected = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(made.teacher_model), logits(expected))
    assert not torch.allclose(logits(made.teacher_model), logits(llama(1)))
    made.train()
    assert len(losses(made)) == 2


def test_a_saved_adapter_is_a_student_by_name_and_learns(tmp_path: Path) -> None:
    _, adapter = save_adapter(tmp_path)
    made = trainer(tmp_path, model=adapter, arguments={"lmbda": 0.0, "learning_rate": 1e-2})
    before = weights(made.model)
    made.train()
    moved = {name for name, value in weights(made.model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora" in name}


def frozen_adapter(folder: Path) -> Any:
    """A student as PEFT's quick start loads it: `is_trainable` is False by default."""
    _, adapter = save_adapter(folder)
    return peft.PeftModel.from_pretrained(llama(0), adapter)


def test_a_student_without_a_weight_that_learns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer(tmp_path, model=frozen_adapter(tmp_path))
    with pytest.raises(ValueError, match=r"requires_grad_\(True\)"):
        trainer(tmp_path, model=llama(0).requires_grad_(False))
    made = trainer(tmp_path, model=llama(0).requires_grad_(False), peft_config=lora())
    made.train()
    assert len(losses(made)) == 2


@pytest.mark.parametrize("share", ["base of the adapter", "the model that PEFT changed"])
def test_a_teacher_that_is_the_base_of_the_student_leaves_it_trainable(share: str, tmp_path: Path) -> None:
    base = llama(0)
    student = peft.get_peft_model(base, lora())
    teacher = student.get_base_model() if share == "base of the adapter" else base
    made = trainer(tmp_path, model=student, teacher=teacher)
    assert any(parameter.requires_grad for parameter in student.parameters())
    assert made.teacher_model is base
    made = trainer(tmp_path, model=student, teacher=copy.deepcopy(student).unload())
    torch.testing.assert_close(logits(made.teacher_model), logits(llama(0)))


@pytest.mark.parametrize(
    "adapter",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_adapters_of_virtual_tokens_are_refused(adapter: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="puts virtual tokens before a batch's padding"):
        trainer(tmp_path, peft_config=adapter)
    with pytest.raises(ValueError, match="puts virtual tokens before a batch's padding"):
        trainer(tmp_path, model=peft.get_peft_model(llama(0), adapter))
