"""Any pairs of texts: a task without a file of its own, whose columns and metrics the experiment chooses.

    prompt  What is the capital of France?
    target  Paris

Rows have `prompt`, `target` and optionally a list of `references`; `data.columns` names other columns. There
are no made rows. Models are decoder-only unless `family` says otherwise.
"""

from collections.abc import Mapping
from typing import Any

from gkd_lab.tasks.scale_defaults import define_scratch_model, define_smol_models
from gkd_lab.tasks.task import Row, Task, read_references, read_text_field


def parse_row(raw: Mapping[str, Any]) -> Row:
    """Return a raw row with `prompt`, `target`, optional `references` as a Row; ValueError otherwise."""
    prompt, target = read_text_field(raw, "prompt"), read_text_field(raw, "target")
    return Row(prompt, target, read_references(raw, target))


_SFT = {"steps": 600, "batch_size": 32, "learning_rate": 2e-3}
SCALES = {
    "nano": {
        "data": {"validation": 200, "test": 200},
        "tokenizer": {"kind": "bpe", "vocab_size": 2048},
        "models": {
            "xl": define_scratch_model(2, 128, 4, **_SFT),
            "large": define_scratch_model(2, 96, 4, **_SFT),
            "base": define_scratch_model(2, 64, 4, **_SFT),
            "small": define_scratch_model(2, 48, 4, **_SFT),
        },
        "teacher_temperature": 1.0,
        "steps": 300,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "cooldown_steps": 75,
        "max_input_tokens": 256,
        "max_output_tokens": 64,
        "evaluations": [{"decoding": "greedy", "split": "test"}],
    },
    "smol": {
        "data": {},
        "models": define_smol_models(1_000),
        "max_input_tokens": 512,
        "max_output_tokens": 128,
        "evaluations": [{"decoding": "greedy", "split": "test"}],
    },
}

TASK = Task(
    scales=SCALES,
    name="text",
    family="decoder-only",
    metrics=("rougeL", "exact_match"),
    generators={},
    parse_row=parse_row,
    columns={"prompt": "prompt", "target": "target", "references": "references"},
    reads_other_columns=False,
)
