"""A student, a teacher and their tokenizer on a test bench: a trainer of the pair and a batch of four rows.

No optimizer step is taken, and what the trainer wants to write goes to a folder that the caller removes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_lab.models.forward import Sequences, completion_logits, evaluating
from gkd_lab.models.rng import uniforms
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.sampling import write
from gkd_lab.training.trainer import GKDTrainer

TEXTS = (
    ("What is two plus three?", "Two plus three is five."),
    ("Name the largest planet of the solar system and say what it is made of.", "Jupiter, mostly of gas."),
    ("Say hello.", "Hello! It is good to see you. How can I help you today?"),
    ("Shorten: The meeting, which began late, lasted until noon.", "The late meeting ended at noon."),
)
"""Prompts and answers of different lengths, so that padding and averages matter."""
NEW_TOKENS = 16
TEACHER_TEMPERATURE = 0.5
"""Other than the student's, so that there is something to learn even from a teacher equal to the student."""


@dataclass(frozen=True)
class Pair:
    """Who learns from whom. teacher_tokenizer: None if it is not known."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: Any
    teacher_tokenizer: Any | None


class Bench:
    """A trainer of the pair, and rows that its own encoder and collator made.

    `refusal` says why the tokenizer's chat template cannot be used; the rows are then plain texts.
    """

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair = pair
        self.trainer = GKDTrainer(
            model=pair.student,
            teacher_model=pair.teacher,
            args=_arguments(folder),
            processing_class=pair.tokenizer,
            teacher_processing_class=pair.teacher_tokenizer,
        )
        self.student: Any = self.trainer.model
        self.teacher: Any = self.trainer.teacher_model
        self.heads = {"student": self.trainer._student_head, "teacher": self.trainer._teacher_head}
        self.device = self.trainer.args.device
        self.is_encoder_decoder = bool(pair.student.config.is_encoder_decoder)
        self.vocabulary = self.trainer._vocabulary
        self.refusal: str | None = None
        self.rows = self._rows()

    def _rows(self) -> Sequences:
        if self.pair.tokenizer.chat_template is not None:
            try:
                return self._collated([{"messages": _chat(*text)} for text in TEXTS])
            except ValueError as error:
                self.refusal = str(error)
        return self._collated([{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in TEXTS])

    def _collated(self, rows: list[dict[str, Any]]) -> Sequences:
        batch = self.trainer.data_collator(rows)
        fields = Sequences.__dataclass_fields__
        return Sequences(**{name: batch[name].to(self.device) for name in fields if name in batch})

    def row(self, n: int) -> Sequences:
        """One row as a batch, as wide as the whole batch."""
        return self.rows.map(lambda tensor: tensor[n : n + 1])

    def micro_batches(
        self, parts: Sequence[Sequences], lmbda: float, *, step: int = 0, normalization: str = "token"
    ) -> list[dict[str, Any]]:
        """What optimizer step `step` trains on, as the trainer itself makes it of these micro-batches."""
        trainer = self.trainer
        # A loss that was no number would freeze the student for all checks that follow.
        trainer.failures.clear()
        trainer.cells = (replace(trainer.cells[0], lmbda=lmbda),)
        trainer.args.loss_normalization = normalization
        trainer.state.global_step = step
        batches = iter([vars(part) for part in parts])
        samples, _ = trainer.get_batch_samples(batches, len(parts), self.device)
        return samples

    def backward(self, samples: Sequence[dict[str, Any]]) -> float:
        """The loss of a step; its gradient is added to that in the student's weights."""
        self.trainer.current_gradient_accumulation_steps = len(samples)
        losses = [self.trainer.training_step(self.student, sample) for sample in samples]
        return float(torch.stack(losses).sum())

    def written(self, rows: Sequences, noise: Tensor | None = None) -> Sequences:
        """What the student answers, token by token from its cache: by `noise`, or its best tokens."""
        return write(
            self.student,
            rows,
            max_new_tokens=NEW_TOKENS,
            end_ids=self.trainer._limits.end_ids,
            pad_id=self.trainer._limits.pad_id,
            uniforms=noise,
            vocabulary=self.vocabulary,
        )

    def noise(self) -> Tensor:
        return uniforms(0, 0, "selfcheck", self.rows.rows, NEW_TOKENS)

    def probabilities(self, model: Any, rows: Sequences) -> Tensor:
        """Of each trained token's place by the training forward, (tokens, V)."""
        return self.logits(model, rows).float().softmax(-1)

    def logits(self, model: Any, rows: Sequences) -> Tensor:
        """The model's own, of each trained token's place, (tokens, V)."""
        with torch.no_grad(), evaluating(model):
            logits = completion_logits(model, rows)[rows.completion_mask.bool()]
        return logits[:, : self.vocabulary]


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _arguments(folder: Path) -> GKDConfig:
    """TRL's defaults, in float32 and with nothing reported."""
    return GKDConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(TEXTS),
        max_new_tokens=NEW_TOKENS,
        teacher_temperature=TEACHER_TEMPERATURE,
        temperature=1.0,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
    )
