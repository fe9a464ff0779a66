"""A teacher that reads a student's rows as text, in its own tokens and with its own conventions.

Shapes: B rows, D completion tokens of the teacher's.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.encoding.tokenization import tokenize_prompts
from gkd_lab.losses.step_loss import MicroBatch
from gkd_lab.losses.token_spans import (
    Span,
    align_spans,
    check_token_ends,
    decode_completion,
    encode_completion,
    non_text_ids,
)
from gkd_lab.losses.uld import TextTeacherLogits
from gkd_lab.models.forward import Sequences
from gkd_lab.teachers.teacher import LiveTeacher, TeacherInterface
from gkd_lab.teachers.teacher_prompts import TeacherPrompts


class TextTeacher:
    """What `ULD` asks of a teacher.

    Args:
        teacher: Of the run.
        tokenizer: The teacher's own, a fast one.
        student_tokenizer: The one that the rows' ids are of, a fast one.
        end_ids: Every id that ends a student's completion.
        prompts: Prompts that need not be told from the student's ids, which may lose what its tokenizer has
            no token for, and what a chat template wrote. Others are decoded, without special tokens.

    Raises:
        ValueError: for a tokenizer that is not fast or has no end.
    """

    def __init__(
        self,
        teacher: TeacherInterface,
        tokenizer: Any,
        student_tokenizer: Any,
        end_ids: Collection[int],
        teacher_prompts: TeacherPrompts | None = None,
    ) -> None:
        for owner, one in (("teacher", tokenizer), ("student", student_tokenizer)):
            check_token_ends(owner, one)
        assert teacher.config is not None, "a teacher of texts is a model"
        self.teacher, self.tokenizer, self.student_tokenizer = teacher, tokenizer, student_tokenizer
        self.is_encoder_decoder = bool(teacher.config.is_encoder_decoder)
        self.end_ids, self.teacher_prompts = (
            frozenset(end_ids),
            {} if teacher_prompts is None else teacher_prompts,
        )
        self._special_ids = non_text_ids(student_tokenizer), non_text_ids(tokenizer)
        # A sharded teacher gives its head back after each use, and all ranks have to run it together.
        self._caches_last_reading = not (isinstance(teacher, LiveTeacher) and teacher.is_sharded)
        self._last_reading: tuple[list[Example], TextTeacherLogits] | None = None

    def activate(self) -> AbstractContextManager[Any]:
        """Its weights are on the device within."""
        return self.teacher.activate()

    def read_rows(self, rows: Sequences) -> TextTeacherLogits:
        """What it makes of the texts of a student's rows, (B) of them.

        Cells of a pack that share their rows ask for them one after another: these are read once.
        """
        prompts = _list_real_ids(rows.prompt_ids, rows.prompt_mask)
        completions = _list_real_ids(rows.completion_ids, rows.completion_mask)
        asked = [Example(*pair) for pair in zip(prompts, completions, strict=True)]
        if self._last_reading is None or self._last_reading[0] != asked or not self._caches_last_reading:
            self._last_reading = asked, self._score_examples(asked, rows)
        return self._last_reading[1]

    def _score_examples(self, asked: Sequence[Example], rows: Sequences) -> TextTeacherLogits:
        found = [self._translate_example(row) for row in asked]
        batch = collate_examples(
            [own for own, _ in found], self.tokenizer.pad_token_id, is_encoder_decoder=self.is_encoder_decoder
        ).to(rows.prompt_ids.device)
        guide = self.teacher.compute_output(MicroBatch(batch, batch, (0,), (False,))).logits
        return TextTeacherLogits(guide, batch.completion_ids, [of_row for _, of_row in found])

    def _translate_example(self, row: Example) -> tuple[Example, list[Span]]:
        """The row in the teacher's tokens, and the spans of both."""
        own, theirs = self._special_ids
        said = decode_completion(self.student_tokenizer, row.completion_ids, self.end_ids, own)
        ids, ends = encode_completion(
            self.tokenizer, said, theirs, is_encoder_decoder=self.is_encoder_decoder
        )
        return Example(self._translate_prompt(row.prompt_ids), ids), align_spans(said.ends, ends)

    def _translate_prompt(self, ids: list[int]) -> list[int]:
        known = self.teacher_prompts.get(tuple(ids))
        if known is not None:
            return list(known)
        text = self.student_tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        (found,) = tokenize_prompts(self.tokenizer, [text], is_encoder_decoder=self.is_encoder_decoder)
        return found


def _list_real_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
