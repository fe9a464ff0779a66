"""How a teacher with a tokenizer of its own reads the prompts of a run's rows: with its own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.losses.token_spans import check_tells_ends

Prompts = Mapping[tuple[int, ...], Sequence[int]]
"""A prompt in the student's ids -> the same prompt as the teacher reads it."""
KEPT = 2**16
"""So many prompts of rows are kept: more than a step has, fewer than a large data set."""


class PromptsOfRows:
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
        student: RowEncoder,
        tokenizer: Any,
        teacher: PretrainedConfig | None,
        known: Prompts | None = None,
    ) -> None:
        check_tells_ends("teacher", tokenizer)
        if teacher is None:
            raise ValueError(
                "uld lets the teacher read texts in its own tokens, and this teacher is no model that could: "
                "give a model, or leave uld out of the objectives"
            )
        self._student = student
        self._teacher = RowEncoder(
            tokenizer,
            is_encoder_decoder=bool(teacher.is_encoder_decoder),
            max_length=student.max_length,
            max_new_tokens=student.max_new_tokens,
            formatting_func=student.formatting_func,
        )
        self.known: dict[tuple[int, ...], Sequence[int]] = dict(known or {})
        self._kept = KEPT + len(self.known)

    def __call__(self, row: Any) -> Example:
        """The row for the student. ValueError: one of the two cannot read it."""
        example = self._student(row)
        place = tuple(example.prompt_ids)
        if not isinstance(row, Example) and place not in self.known:
            try:
                self.known[place] = self._teacher(row).prompt_ids
            except ValueError as error:
                raise ValueError(f"uld: with the teacher's tokenizer: {error}") from error
            if len(self.known) > self._kept:
                del self.known[next(iter(self.known))]
        return example
