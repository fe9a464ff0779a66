"""Help of `gkd-lab train`: the options that matter in groups, the rest of TRL's by name.

    python -m gkd_lab.scripts.train_help     # writes train_help.txt, which `gkd-lab train --help` prints

The file answers at once; TRL, which knows the options, takes seconds to load.
"""

import re
import textwrap
from argparse import Action
from pathlib import Path

from gkd_lab.scripts.train_options import TEXT_METRICS, TrainParser

HELP_FILE = Path(__file__).with_name("train_help.txt")
EXAMPLE = """\
Usage: gkd-lab train --config run.yaml [--OPTION VALUE ...]

  Distil one student of yours from one teacher, with the options of `trl sft` and `trl distillation`.

  A file holds `option: value` lines; options on the command line override it, and `env:` sets environment
  variables. Several processes: accelerate launch -m gkd_lab train --config run.yaml
  Brackets hold defaults. On a machine without a GPU bf16 is False and use_cpu True.

Example, run.yaml:

  model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
  teacher_model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
  dataset_name: data            # a folder with train.jsonl and test.jsonl, a file, or a name of the hub
  output_dir: student
  lmbda: 0.5
  beta: 0.1
  max_new_tokens: 128
  num_train_epochs: 1
  learning_rate: 1.0e-5
  metrics: [rougeL]
  eval_strategy: steps
  eval_steps: 100
"""
GROUPS: dict[str, tuple[str, ...]] = {
    "Models": (
        *("model_name_or_path", "model_revision", "teacher_model_name_or_path", "teacher_model_revision"),
        *("dtype", "attn_implementation", "teacher_dtype", "park_teacher", "model_init_kwargs"),
        *("teacher_model_init_kwargs", "trust_remote_code"),
    ),
    "Data": (
        *(
            "dataset_name",
            "dataset_config",
            "dataset_train_split",
            "dataset_eval_split",
            "dataset_test_split",
        ),
        *("dataset_streaming", "datasets", "test_split_size", "max_train_samples", "max_eval_samples"),
        *("max_test_samples", "max_length", "chat_template_path", "eos_token", "pad_token"),
    ),
    "Distillation": (
        *("lmbda", "beta", "divergence", "rescale_divergence", "temperature", "max_new_tokens"),
        *("teacher_temperature", "student_temperature", "loss_normalization", "objectives", "seq_kd"),
        *("use_vllm", "log_term_gradients"),
    ),
    "Evaluation": (
        *("metrics", "eval_strategy", "eval_steps", "eval_decoding", "eval_temperature", "eval_num_beams"),
        *("eval_on_policy", "per_device_eval_batch_size", "metric_for_best_model", "load_best_model_at_end"),
        *("early_stopping_patience", "early_stopping_threshold"),
    ),
    "Training": (
        *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim"),
        *("weight_decay", "max_grad_norm", "seed", "bf16", "use_cpu", "gradient_checkpointing"),
        *("logging_steps", "report_to", "save_strategy", "save_steps", "save_total_limit"),
        "resume_from_checkpoint",
    ),
    "LoRA": (
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
        *("load_in_4bit", "load_in_8bit"),
    ),
    "Hub": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_token"),
}
"""Group -> the options that are explained; all others are only named."""
TEXTS = {
    "model_name_or_path": "The student: a folder or a model of the hub",
    "teacher_model_name_or_path": "The teacher: a folder or a model of the hub",
    "model_init_kwargs": "Further arguments of the student's `from_pretrained`",
    "teacher_model_init_kwargs": "Further arguments of the teacher's `from_pretrained`",
    "dataset_name": "A folder with train.jsonl or train.parquet, one such file, a folder of `save_to_disk`, "
    "or a data set of the hub",
    "dataset_test_split": "Split to score at the end, and to evaluate on unless `dataset_eval_split` is set",
    "datasets": "A mixture of data sets, as in TRL (in the file)",
    "test_split_size": "Make `test` out of so many training rows, or such a share of them",
    "pad_token": "Token used for padding",
    "lmbda": "Share of steps that train on text which the student has just written",
    "beta": "0: forward KL, 1: reverse KL, between: JSD(beta)",
    "divergence": "`jsd` or `tv`, total variation, which has no beta",
    "seq_kd": "Let the teacher write the text that is trained on, once for each prompt",
    "metrics": f"Scores of the text that the student writes, of: {', '.join(TEXT_METRICS)}",
    "metric_for_best_model": "`eval_loss`, or `eval_METRIC` of one in `metrics`",
    "resume_from_checkpoint": "`true`: the last one in `output_dir`; or a folder",
    "push_to_hub": "Push the student and its card at the end, and checkpoints as `hub_strategy` says",
}
"""Help of options that mean more here than in TRL, or that TRL explains at length."""
_WIDTH, _COLUMN = 108, 34


def format_help() -> str:
    """Return the help text: usage, example, groups with one line for each option, names of all others."""
    parser = TrainParser()
    parts = [EXAMPLE]
    for title, names in GROUPS.items():
        actions = [action for name in names if (action := parser.find_action(name)) is not None]
        parts.append(f"{title}:\n" + "".join(_format_option(action) for action in actions))
    parts.append(_format_other_options(parser))
    return "\n".join(parts)


def _format_option(action: Action) -> str:
    """Return an option's lines: its name, what it does, its default."""
    text = TEXTS.get(action.dest) or re.split(r"\. (?=[A-Z])", action.help or "")[0].rstrip(".")
    default = (
        "" if action.default in (None, [], "") else f" [{getattr(action.default, 'value', action.default)}]"
    )
    lines = textwrap.wrap(text + default, _WIDTH - _COLUMN)
    name = f"  --{action.dest}".ljust(_COLUMN)
    first = name + lines[0] if len(name) <= _COLUMN else f"{name}\n{' ' * _COLUMN}{lines[0]}"
    return "\n".join([first, *(" " * _COLUMN + line for line in lines[1:])]) + "\n"


def _format_other_options(parser: TrainParser) -> str:
    """Return the names of the options that no group explains."""
    explained = {name for names in GROUPS.values() for name in names}
    names = [name for name in parser.list_options() if name not in explained]
    text = textwrap.fill(", ".join(names), _WIDTH, initial_indent="  ", subsequent_indent="  ")
    return f"Further options, as TRL and transformers' TrainingArguments document them:\n{text}"


if __name__ == "__main__":
    HELP_FILE.write_text(format_help())
