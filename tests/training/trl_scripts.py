"""Two scripts as a user of TRL writes them, with the import of the trainer left open.

They name their models by folder, as they would name them on the hub, and leave everything else at its
default but the device and the tracker.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from ..models.tiny import tiny_model, tiny_tokenizer

FROM_TRL = "from trl.experimental.gkd import GKDConfig, GKDTrainer"
FROM_GKD_LAB = "from gkd_lab import GKDConfig, GKDTrainer"

TODAYS = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
{the_import}

tokenizer = AutoTokenizer.from_pretrained("student")
student = AutoModelForCausalLM.from_pretrained("student")
teacher = AutoModelForCausalLM.from_pretrained("teacher")

conversation = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "c b a"}]
trainer = GKDTrainer(
    model=student,
    teacher_model=teacher,
    args=GKDConfig(output_dir="distilled", per_device_train_batch_size=1, use_cpu=True, report_to="none"),
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"messages": [conversation] * 2}),
    eval_dataset=Dataset.from_dict({"messages": [conversation] * 2}),
)
trainer.train()
"""
"""In the style of the quick start of TRL's current documentation."""

YESTERDAYS = (
    TODAYS.replace("processing_class=tokenizer", "tokenizer=tokenizer")
    .replace('report_to="none"', 'report_to="none", max_seq_length=48')
    .replace("distilled", "distilled-as-before")
)
"""In the style of older documentation: the tokenizer and the longest sequence under their former names."""

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'user' %} = {% else %} </s>{% endif %}{% endfor %}"
)


def save_models(folder: Path) -> None:
    """The folders `student` and `teacher` with a tiny model, its tokenizer and a chat template each."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate(("student", "teacher")):
        tiny_model("decoder-only", seed, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run(script: str, the_import: str) -> tuple[Any, list[warnings.WarningMessage]]:
    """The script's trainer when it is done, and what the script was warned of; runs in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(script.replace("{the_import}", the_import), "script.py", "exec"), names)
    return names["trainer"], caught
