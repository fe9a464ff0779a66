"""Supervised fine-tuning of teachers and SFT students by the trainers of TRL and transformers.

TRL's SFTTrainer for decoder-only models, transformers' Seq2SeqTrainer for encoder-decoders, its Trainer for
classifiers.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gkd_lab.config.artifact_specs import OptimizerSpec, SftSpec
from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.labelled_rows import (
    LabelledExample,
    build_transformers_batch,
    collate_labelled_rows,
)
from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.runner.checkpoint_callback import CheckpointCallback
from gkd_lab.runner.interrupts import delay_signals
from gkd_lab.runner.progress import ProgressUpdate
from gkd_lab.store import Record
from gkd_lab.training.checkpoints import build_checkpoint_path, list_complete_steps, remove_other_checkpoints

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

OPTIMIZER_NAMES = {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}


def build_optimizer_arguments(optimizer: OptimizerSpec) -> dict[str, Any]:
    """Return optimizer, clipping, warm-up and linear cooldown as arguments of transformers' Trainer."""
    return {
        "optim": OPTIMIZER_NAMES[optimizer.name],
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "warmup_steps": optimizer.warmup_steps,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_decay_steps": optimizer.cooldown_steps,
            "decay_type": "linear",
        },
    }


def build_trainer_arguments(folder: Path, steps: int, save_every: int, log_every: int) -> dict[str, Any]:
    """Return the Trainer arguments of all trainings: steps, two checkpoints kept, logging, GPU if any."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": save_every,
        "save_total_limit": 2,
        "logging_steps": log_every,
        "report_to": [],
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Explicit, because transformers refuses bf16 without a GPU otherwise.
        "use_cpu": not torch.accelerator.is_available(),
    }


class HistoryCallback(TrainerCallback):
    """Callback that updates the progress bar and writes the Trainer's log into the record."""

    def __init__(self, update_progress: ProgressUpdate, record: Record | None = None) -> None:
        self.update_progress, self.record = update_progress, record

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the progress to the number of optimizer steps done."""
        self.update_progress(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append step, loss, gradient norm, learning rate to the record's history; skip logs without loss."""
        if self.record is not None and "loss" in (logs or {}):
            names = ("loss", "grad_norm", "learning_rate")
            self.record.log_row(
                {"step": state.global_step, **{name: logs[name] for name in names if name in logs}}
            )


def fine_tune(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Any],
    sft: SftSpec,
    record: Record,
    update_progress: ProgressUpdate,
    *,
    save_every: int,
    log_every: int,
) -> None:
    """Train `model` in place on completions or labels, from the record's last checkpoint; return nothing.

    If that checkpoint has all steps, only its weights are loaded. The final model is not exported.
    """
    folder = record.steps_folder
    done_steps = max(list_complete_steps(folder), default=0)
    checkpoint = build_checkpoint_path(str(folder), done_steps) if done_steps else None
    record.rewind_history(done_steps)
    if checkpoint is not None and done_steps >= sft.steps:
        from safetensors.torch import load_model

        load_model(model, checkpoint / "model.safetensors")
        model.config.use_cache = False  # as transformers' Trainer leaves it, for the exported config
        return
    arguments = {
        **build_trainer_arguments(folder, sft.steps, save_every, log_every),
        **build_optimizer_arguments(sft.optimizer),
        "per_device_train_batch_size": sft.batch_size,
        "dataloader_drop_last": len(examples) > sft.batch_size,
        "seed": sft.seed,
        "remove_unused_columns": False,
    }
    create_trainer: Callable[..., Trainer] = _create_causal_trainer
    if get_classifier_kind(model) is not None:
        create_trainer = _create_classifier_trainer
    elif model.config.is_encoder_decoder:
        create_trainer = _create_seq2seq_trainer
    trainer = create_trainer(model, tokenizer, examples, arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(HistoryCallback(update_progress, record))
    trainer.add_callback(CheckpointCallback([folder]))
    with delay_signals():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    remove_other_checkpoints(str(folder), sft.steps)


def _create_causal_trainer(
    model: PreTrainedModel, tokenizer: Any, examples: Sequence[Example], arguments: dict[str, Any]
) -> Trainer:
    """Return TRL's SFTTrainer for a decoder-only model, with loss on completions and not on prompts."""
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "input_ids": example.prompt_ids + example.completion_ids,
            "labels": [-100] * len(example.prompt_ids) + example.completion_ids,
        }
        for example in examples
    ]
    config = SFTConfig(
        **arguments,
        bf16=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def _create_classifier_trainer(
    model: PreTrainedModel, tokenizer: Any, examples: Sequence[LabelledExample], arguments: dict[str, Any]
) -> Trainer:
    """Return transformers' Trainer for a classifier and its labelled examples."""
    kind = get_classifier_kind(model)
    assert kind is not None, "a classifier"

    def collate_rows(rows: Sequence[LabelledExample]) -> dict[str, Tensor]:
        """Pad labelled examples into one batch of the classifier's forward arguments, labels included."""
        return build_transformers_batch(collate_labelled_rows(rows, tokenizer.pad_token_id, kind), kind)

    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=list(examples),
        processing_class=tokenizer,
        data_collator=collate_rows,
    )


def _create_seq2seq_trainer(
    model: PreTrainedModel, tokenizer: Any, examples: Sequence[Example], arguments: dict[str, Any]
) -> Trainer:
    """Return transformers' Seq2SeqTrainer for an encoder-decoder: prompts are inputs, completions labels."""
    rows = [{"input_ids": example.prompt_ids, "labels": example.completion_ids} for example in examples]
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
