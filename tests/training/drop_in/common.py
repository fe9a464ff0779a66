"""Both trainers from one script, and what several files of these tests share."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    EvalPrediction,
)
from trl.experimental.gkd import GKDConfig as TrlConfig
from trl.experimental.gkd import GKDTrainer as TrlTrainer

from gkd_lab import GKDConfig, GKDTrainer

from ...training.scripts import chat_tokenizer, config, conversations, llama

OFF = {"lmbda": 0.0}
HALF = {"lmbda": 0.5}
ON = {"lmbda": 1.0}
ROUNDING = 1e-5
"""Relative, float32; both compute the same sums in another order."""
Make = Callable[..., Any]


def both(folder: Path, rows: Any = None, *, model: Make = llama, **changes: Any) -> list[Any]:
    """TRL's trainer and ours from one script, and so on the same data in the same order."""
    options = dict(changes)
    trainer_options = {name: options.pop(name) for name in tuple(options) if name in OPTIONS}
    made = []
    for kind, arguments in ((TrlTrainer, TrlConfig), (GKDTrainer, GKDConfig)):
        defaults = vars(config(folder))
        fields = {name: defaults[name] for name in FIELDS}
        made.append(
            kind(
                model=model(0),
                teacher_model=llama(1, width=24),
                args=arguments(**{**fields, **OFF, "per_device_train_batch_size": 8, **options}),
                train_dataset=Dataset.from_list(conversations() if rows is None else rows),
                processing_class=chat_tokenizer(),
                **copy.deepcopy(trainer_options),
            )
        )
    return made


OPTIONS = ("eval_dataset", "compute_metrics", "preprocess_logits_for_metrics", "peft_config", "optimizers")
FIELDS = (
    "output_dir",
    "max_steps",
    "learning_rate",
    "max_new_tokens",
    "logging_steps",
    "save_strategy",
    "report_to",
    "disable_tqdm",
    "use_cpu",
    "bf16",
)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=name)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name, value in one.items() if not torch.equal(value, other[name])]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def token_accuracy(found: EvalPrediction) -> dict[str, float]:
    """For a decoder-only model, from its logits."""
    logits, labels = found.predictions[:, :-1], found.label_ids[:, 1:]
    mask = labels != -100
    return {
        "accuracy": float((logits.argmax(-1) == labels)[mask].mean()),
        "tokens": int(mask.sum()),
    }


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **changes)
