"""Adapters, saving and resuming as a user of TRL's GKDTrainer knows them."""

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from gkd_lab import GKDConfig, GKDTrainer

from ...training.scripts import (
    CHATML,
    chat_tokenizer,
    config,
    conversations,
    llama,
    logged,
    t5,
    trainer,
    weights,
)
from .common import HALF, ON, Make, Stream, assert_close, assert_same, lora


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("model", "task"), [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
def test_an_adapter_alone_is_trained_and_saved(
    tmp_path: Path, model: Make, task: str, checkpointing: bool
) -> None:
    def made(**changes: Any) -> GKDTrainer:
        return trainer(
            tmp_path,
            model=model(0),
            teacher=model(1),
            peft_config=lora(task_type=task),
            arguments={
                **HALF,
                "max_steps": 4,
                "learning_rate": 1e-2,
                "save_strategy": "steps",
                "save_steps": 2,
                "gradient_checkpointing": checkpointing,
                **changes,
            },
        )

    straight = made()
    start = weights(straight.model)
    straight.train()
    end = weights(straight.model)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if "lora_" in name}
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed.model), end)
    loaded = peft.PeftModel.from_pretrained(model(0), str(tmp_path / "checkpoint-4"))
    ids = torch.arange(2, 8)[None]
    batch = {"input_ids": ids, **({"labels": ids} if straight.model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, straight.model.eval()(**batch).logits)


@pytest.mark.parametrize(("model", "task"), [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
def test_sampling_uses_the_adapter_and_a_copied_teacher_does_not(
    tmp_path: Path, model: Make, task: str
) -> None:
    """The copy is made before the adapter is there, so the adapter moves away from it."""
    with pytest.warns(UserWarning, match="copy"):
        made = GKDTrainer(
            model=model(0),
            args=config(tmp_path, **ON),
            train_dataset=conversations(),
            processing_class=chat_tokenizer(),
            peft_config=lora(task_type=task),
        )
    assert not isinstance(made.teacher_model, peft.PeftModel)
    batch = made.data_collator(conversations(4))
    assert made.compute_loss(made.model, batch).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert made.compute_loss(made.model, batch).item() > 1e-3
    assert_close(weights(made.teacher_model), weights(model(0)), atol=0)
    texts = []
    for enabled in (True, False):
        if not enabled:
            made.model.base_model.disable_adapter_layers()
        seen = written(made)
        texts.append(seen)
    assert texts[0] != texts[1]


def written(made: GKDTrainer) -> list[list[int]]:
    """Return the students' completions in the first step."""
    samples, _ = made.get_batch_samples(iter(made.get_train_dataloader()), 2, torch.device("cpu"))
    return [row for sample in samples for row in sample["batch"].student.completion_ids.tolist()]


def test_a_model_with_an_adapter_may_be_given(tmp_path: Path) -> None:
    torch.manual_seed(42)
    student = peft.get_peft_model(llama(0), lora(task_type="CAUSAL_LM"))
    ready = trainer(tmp_path, model=student, arguments=HALF)
    ready.train()
    base = {n: v for n, v in weights(student).items() if "lora_" not in n}
    assert_same(
        {n.removeprefix("base_model.model.").replace(".base_layer", ""): v for n, v in base.items()},
        weights(llama(0)),
    )
    with pytest.raises(ValueError, match="adapter already"):
        trainer(tmp_path, model=student, peft_config=lora())
    with pytest.raises(TypeError, match="peft_config is a dict"):
        trainer(tmp_path, peft_config={"r": 4})


# ---- saving and resuming ----


@pytest.mark.slow
@pytest.mark.parametrize("model", [llama, t5])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, model: Make, accumulation: int, at: int
) -> None:
    """Four steps an epoch, or two; so both points lie within one. Dropout is on."""

    def made(folder: Path) -> GKDTrainer:
        return trainer(
            folder,
            model=model(0, dropout=0.1),
            teacher=model(1),
            arguments={
                **HALF,
                "max_steps": 5,
                "gradient_accumulation_steps": accumulation,
                "disable_dropout": False,
                "save_strategy": "steps",
                "save_steps": 1,
                "seed": 3,
            },
        )

    straight = made(tmp_path / "straight")
    straight.train()
    assert set(logged(straight, "on_policy")) == {0.0, 1.0}
    shutil.copytree(tmp_path / "straight" / f"checkpoint-{at}", tmp_path / "again" / f"checkpoint-{at}")
    resumed = made(tmp_path / "again")
    torch.rand(at)  # whatever was drawn before
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    for name in ("loss", "grad_norm", "learning_rate", "on_policy", "completion_length", "entropy"):
        assert logged(resumed, name) == logged(straight, name)


def test_a_stream_resumes_where_it_stopped(tmp_path: Path) -> None:
    def made() -> GKDTrainer:
        arguments = {**HALF, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        return trainer(tmp_path, train_dataset=Stream(conversations()), arguments=arguments)

    straight = made()
    straight.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(weights(resumed.model), weights(straight.model))


@pytest.mark.parametrize(("model", "auto"), [(llama, AutoModelForCausalLM), (t5, AutoModelForSeq2SeqLM)])
def test_what_is_saved_is_a_model_with_its_tokenizer(tmp_path: Path, model: Make, auto: Any) -> None:
    made = trainer(
        tmp_path / "run",
        model=model(0),
        teacher=model(1),
        arguments={**HALF, "save_strategy": "steps", "save_steps": 2},
    )
    made.train()
    made.save_model(str(tmp_path / "own"))
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "own"):
        assert_same(weights(auto.from_pretrained(folder)), weights(made.model))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == chat_tokenizer().get_vocab()
        assert tokenizer.chat_template == CHATML
        arguments = torch.load(folder / "training_args.bin", weights_only=False)
        assert isinstance(arguments, GKDConfig) and arguments.lmbda == 0.5
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists()
