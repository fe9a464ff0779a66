"""What becomes of each field of `GKDConfig`: read by whom, without effect, or refused, and why.

    python -m gkd_lab.training.config_fields     # writes the table into docs/trl.md

A field that is neither honoured nor refused would change a user's result in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gkd_lab.training.arguments import GKDConfig, TrlGKDConfig


@dataclass(frozen=True)
class Refusal:
    """Values of a field that are accepted, and why no other is."""

    accepted: tuple[Any, ...]
    reason: str


REFUSED: Mapping[str, Refusal] = {
    "packing": Refusal((False,), "rows are not packed: the student answers each prompt in its own row"),
    "eval_packing": Refusal((None, False), "rows are not packed, those of the evaluation neither"),
    "padding_free": Refusal((False,), "rows are padded: the student samples from a batch of prompts"),
    "train_sampling_strategy": Refusal(
        ("random", "sequential"), "the length of a row is unknown before it is sampled"
    ),
    "label_smoothing_factor": Refusal(
        (0.0,),
        "targets are the teacher's, or labels as they are; a warmer `teacher_temperature` softens",
    ),
    "assistant_only_loss": Refusal(
        (False,), "the last assistant turn is the target; make a row of each turn to train on all"
    ),
    "completion_only_loss": Refusal(
        (None, True), "a student learns on completions alone, as it writes completions alone"
    ),
    "loss_type": Refusal(("nll",), "the loss is made of `objectives`"),
    "truncation_mode": Refusal(
        ("keep_start",), "a prompt keeps its last tokens and a completion its first, see `max_length`"
    ),
    "torch_compile": Refusal(
        (False,), "the student changes between sampling and training, and its heads are applied in chunks"
    ),
    "pad_to_multiple_of": Refusal((None, "auto"), "prompts and completions are padded to a batch's longest"),
}
"""Fields with values that do not fit; another value raises ValueError."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "packing_strategy": "rows are not packed",
    "length_column_name": "rows are not grouped by length",
    "activation_offloading": "activations stay on the device (a warning says so)",
    "shuffle_dataset": "rows are shuffled anyway, unless `train_sampling_strategy` is `sequential`",
    "dataset_text_field": "a row is read by its columns: `messages`, `prompt`, ...",
    "dataset_kwargs": "rows are encoded when a batch is made",
    "dataset_num_proc": "rows are encoded when a batch is made",
    "torch_compile_backend": "`torch_compile` is refused",
    "torch_compile_mode": "`torch_compile` is refused",
    "remove_unused_columns": "set to False: the collator reads the texts",
    "use_cache": "sampling always caches, training never does",
    "do_train": "as in transformers, for scripts to read",
    "do_eval": "as in transformers, for scripts to read",
    "do_predict": "as in transformers, for scripts to read",
    "max_seq_length": "deprecated name of `max_length`, which it sets",
}
"""Fields that may have any value."""


def check_options(args: GKDConfig) -> None:
    """Raise ValueError for a field whose value does not fit GKD, with the values that do and the reason."""
    for name, refusal in REFUSED.items():
        value = getattr(args, name)
        if value not in refusal.accepted:
            choices = " or ".join(map(repr, refusal.accepted))
            raise ValueError(f"{name}={value!r} does not fit GKD: {refusal.reason}; leave it {choices}")


def list_readers() -> dict[str, str]:
    """Return field -> who reads it, for the fields that are honoured."""
    trainer, trl = set(_list_transformers_fields()), {field.name for field in fields(TrlGKDConfig)}
    return {
        field.name: "transformers" if field.name in trainer else "as TRL" if field.name in trl else "gkd_lab"
        for field in fields(GKDConfig)
        if field.name not in REFUSED and field.name not in WITHOUT_EFFECT
    }


def _list_transformers_fields() -> list[str]:
    """Return the names of the fields of transformers' TrainingArguments."""
    from transformers import TrainingArguments

    return [field.name for field in fields(TrainingArguments)]


# ---- docs/trl.md ----

DOCUMENT = Path(__file__).parents[2] / "docs" / "trl.md"
BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"


def format_options() -> str:
    """Return the table of all fields as Markdown."""
    readers = list_readers()
    rows = ["| field | what becomes of it |", "|---|---|"]
    for reader, text in (
        ("gkd_lab", "read here (table above)"),
        ("as TRL", "read here, as TRL does"),
        ("transformers", "read by transformers' Trainer"),
    ):
        names = ", ".join(f"`{name}`" for name in sorted(readers) if readers[name] == reader)
        rows.append(f"| {names} | {text} |")
    for name, refusal in sorted(REFUSED.items()):
        choices = ", ".join(f"`{value!r}`" for value in refusal.accepted)
        rows.append(f"| `{name}` | refused unless {choices}: {refusal.reason} |")
    for name, reason in sorted(WITHOUT_EFFECT.items()):
        rows.append(f"| `{name}` | without effect: {reason} |")
    return "\n".join(rows)


def insert_options(document: str) -> str:
    """Return the text of docs/trl.md with the table between its two marks."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{format_options()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(insert_options(DOCUMENT.read_text()))
