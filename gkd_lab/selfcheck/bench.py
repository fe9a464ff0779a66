"""Test bench of a student, a teacher and their tokenizer: a trainer of the pair and a batch of four rows.

No optimizer step is taken, and the trainer writes to a folder that the caller removes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_lab.models.forward import Sequences, compute_completion_logits, eval_mode
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.selfcheck.rotary import describe_fixed_lengths, explain_length_dependence
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.sampling import generate_completions
from gkd_lab.training.trainer import GKDTrainer

PROMPTS_AND_ANSWERS = (
    ("What is two plus three?", "Two plus three is five."),
    ("Name the largest planet of the solar system and say what it is made of.", "Jupiter, mostly of gas."),
    ("Say hello.", "Hello! It is good to see you. How can I help you today?"),
    ("Shorten: The meeting, which began late, lasted until noon.", "The late meeting ended at noon."),
)
"""Of different lengths, so that padding and averages matter."""
MAX_NEW_TOKENS = 16
TEACHER_TEMPERATURE = 0.5
"""Unlike the student's, so that there is something to learn even from a teacher equal to the student."""


@dataclass(frozen=True)
class ModelPair:
    """A student and its teacher. teacher_tokenizer: None if it is not known."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: Any
    teacher_tokenizer: Any | None


class PairBench:
    """A trainer of the pair, and rows that its own encoder and collator made.

    `chat_template_error` says why the tokenizer's chat template cannot be used; the rows are then plain
    texts. `length_dependence` says, for each model whose outputs depend on the length of these batches, why;
    `length_note` warns of such a dependence in longer batches.
    """

    def __init__(self, pair: ModelPair, folder: Path) -> None:
        self.pair = pair
        self.trainer = GKDTrainer(
            model=pair.student,
            teacher_model=pair.teacher,
            args=_build_arguments(folder),
            processing_class=pair.tokenizer,
            teacher_processing_class=pair.teacher_tokenizer,
        )
        self.student: Any = self.trainer.model
        self.teacher: Any = self.trainer.teacher_model
        self.heads = {"student": self.trainer.student_head, "teacher": self.trainer.teacher_head}
        self.device = self.trainer.args.device
        self.is_encoder_decoder = bool(pair.student.config.is_encoder_decoder)
        self.pad_id = self.trainer.generation_limits.pad_id
        self.vocabulary_size = self.trainer.generation_limits.vocabulary_size
        self.chat_template_error: str | None = None
        self.rows = self._build_rows()
        prompt_length, answer_length = self.rows.prompt_ids.shape[1], self.rows.completion_ids.shape[1]
        longest = prompt_length + max(answer_length, MAX_NEW_TOKENS)
        models = {"student": pair.student, "teacher": pair.teacher}
        self.length_dependence = explain_length_dependence(models, longest)
        self.length_note = describe_fixed_lengths(models, longest)

    def _build_rows(self) -> Sequences:
        """Return the batch of the four texts, as chats; as plain texts without a working chat template.

        The failure's message is kept as `chat_template_error`.
        """
        if self.pair.tokenizer.chat_template is not None:
            try:
                return self._collate_rows([{"messages": _build_chat(*text)} for text in PROMPTS_AND_ANSWERS])
            except ValueError as error:
                self.chat_template_error = str(error)
        return self._collate_rows(
            [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in PROMPTS_AND_ANSWERS]
        )

    def _collate_rows(self, rows: list[dict[str, Any]]) -> Sequences:
        """Encode and collate dataset rows by the trainer's collator; return `Sequences` on the device."""
        batch = self.trainer.data_collator(rows)
        fields = Sequences.__dataclass_fields__
        return Sequences(**{name: batch[name].to(self.device) for name in fields if name in batch})

    def select_row(self, n: int) -> Sequences:
        """Return row `n` as a batch of one, still padded as wide as the whole batch."""
        return self.rows.map_tensors(lambda tensor: tensor[n : n + 1])

    def build_micro_batches(
        self, parts: Sequence[Sequences], lmbda: float, *, step: int = 0, normalization: str = "token"
    ) -> list[dict[str, Any]]:
        """Let the trainer build step `step` of these micro-batches (it samples at lmbda); return its samples.

        Sets the trainer's lmbda, loss normalization and step, and clears its failures.
        """
        trainer = self.trainer
        # A loss that is not finite would freeze the student for all checks that follow.
        trainer.failures.clear()
        trainer.cells = (replace(trainer.cells[0], lmbda=lmbda),)
        trainer.args.loss_normalization = normalization
        trainer.state.global_step = step
        batches = iter([vars(part) for part in parts])
        samples, _ = trainer.get_batch_samples(batches, len(parts), self.device)
        return samples

    def accumulate_gradients(self, samples: Sequence[dict[str, Any]]) -> float:
        """Run forward and backward on a step's samples: return the summed loss, add gradients to `.grad`."""
        self.trainer.current_gradient_accumulation_steps = len(samples)
        losses = [self.trainer.training_step(self.student, sample) for sample in samples]
        return float(torch.stack(losses).sum())

    def generate_answers(self, rows: Sequences, noise: Tensor | None = None) -> Sequences:
        """Let the student complete the prompts with its cache, sampled by `noise` or else greedily."""
        return generate_completions(
            self.student,
            rows,
            max_new_tokens=MAX_NEW_TOKENS,
            end_ids=self.trainer.generation_limits.end_ids,
            pad_id=self.pad_id,
            uniforms=noise,
            vocabulary_size=self.vocabulary_size,
        )

    def draw_noise(self) -> Tensor:
        """Return uniform numbers, always the same, (rows, MAX_NEW_TOKENS)."""
        return draw_uniforms(0, 0, "selfcheck", self.rows.num_rows, MAX_NEW_TOKENS)

    def compute_probabilities(self, model: Any, rows: Sequences) -> Tensor:
        """Return the model's probabilities at each completion token, (tokens, V): one forward, no cache."""
        return self.compute_logits(model, rows).float().softmax(-1)

    def compute_logits(self, model: Any, rows: Sequences) -> Tensor:
        """Return the model's logits for each completion token of all rows, (tokens, V), in eval mode."""
        with torch.no_grad(), eval_mode(model):
            logits = compute_completion_logits(model, rows)[rows.completion_mask.bool()]
        return logits[:, : self.vocabulary_size]


def _build_chat(question: str, answer: str) -> list[dict[str, str]]:
    """Return the messages of a conversation: a user's question and the assistant's answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _build_arguments(folder: Path) -> GKDConfig:
    """Return a GKDConfig for the bench: float32, no reports or saves, a teacher temperature of 0.5."""
    return GKDConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(PROMPTS_AND_ANSWERS),
        max_new_tokens=MAX_NEW_TOKENS,
        teacher_temperature=TEACHER_TEMPERATURE,
        temperature=1.0,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
    )
