"""How a teacher with a tokenizer of its own reads the prompts of a run's rows: with its own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.losses.token_spans import check_token_ends

TeacherPrompts = Mapping[tuple[int, ...], Sequence[int]]
"""A prompt in the student's ids -> the same prompt as the teacher reads it."""
MAX_CACHED_PROMPTS = 2**16
"""So many prompts of rows are kept: more than a step has, fewer than a large data set."""


class TwoTokenizerEncoder:
    """Encodes rows for the student, and keeps how the teacher reads their prompts.

    Args:
        student: What makes examples of rows.
        tokenizer: The teacher's.
        teacher: The configuration of its model.
        known: Prompts of rows that are examples already, or of anything else.

    Raises:
        ValueError: for a teacher that is no model here, and a tokenizer that is not fast or has no end.
    """

    def __init__(
        self,
        student_encoder: RowEncoder,
        tokenizer: Any,
        teacher_config: PretrainedConfig | None,
        teacher_prompts: TeacherPrompts | None = None,
    ) -> None:
        check_token_ends("teacher", tokenizer)
        if teacher_config is None:
            raise ValueError(
                "uld lets the teacher read texts in its own tokens, and this teacher is no model that could: "
                "give a model, or leave uld out of the objectives"
            )
        self._student_encoder = student_encoder
        self._teacher_encoder = RowEncoder(
            tokenizer,
            is_encoder_decoder=bool(teacher_config.is_encoder_decoder),
            max_length=student_encoder.max_length,
            max_new_tokens=student_encoder.max_new_tokens,
            formatting_func=student_encoder.formatting_func,
        )
        self.teacher_prompts: dict[tuple[int, ...], Sequence[int]] = dict(teacher_prompts or {})
        self._max_prompts = MAX_CACHED_PROMPTS + len(self.teacher_prompts)

    def __call__(self, row: Any) -> Example:
        """The row for the student. ValueError: one of the two cannot read it."""
        example = self._student_encoder(row)
        place = tuple(example.prompt_ids)
        if not isinstance(row, Example) and place not in self.teacher_prompts:
            try:
                self.teacher_prompts[place] = self._teacher_encoder(row).prompt_ids
            except ValueError as error:
                raise ValueError(f"uld: with the teacher's tokenizer: {error}") from error
            if len(self.teacher_prompts) > self._max_prompts:
                del self.teacher_prompts[next(iter(self.teacher_prompts))]
        return example
