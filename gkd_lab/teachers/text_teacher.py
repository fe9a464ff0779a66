"""Teacher with another tokenizer than the student: it reads texts in its own tokens.

Shapes: B rows, D completion tokens of the teacher's.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.encoding.tokenization import tokenize_prompts
from gkd_lab.losses.step_loss import MicroBatch
from gkd_lab.losses.token_spans import (
    Span,
    align_spans,
    check_uld_tokenizer,
    decode_completion,
    encode_completion,
    non_text_ids,
)
from gkd_lab.losses.uld import TextTeacherLogits
from gkd_lab.models.forward import Sequences
from gkd_lab.teachers.teacher import LiveTeacher, TeacherInterface

TeacherPrompts = Mapping[tuple[int, ...], Sequence[int]]
"""Prompt in the student's ids -> the same prompt in the teacher's ids."""
MAX_CACHED_PROMPTS = 2**16
"""Prompts that are kept: more than a step has, fewer than a large dataset."""


class TwoTokenizerEncoder:
    """Encodes rows for the student, and remembers their prompts in the teacher's tokens and chat template.

    Args:
        student_encoder: Encodes a row for the student.
        tokenizer: The teacher's.
        teacher_config: The configuration of its model.
        teacher_prompts: Prompts of rows that are `Example`s already.

    Raises:
        ValueError: if the teacher is no model, or its tokenizer is not fast or has no end of sequence.
    """

    def __init__(
        self,
        student_encoder: RowEncoder,
        tokenizer: Any,
        teacher_config: PretrainedConfig | None,
        teacher_prompts: TeacherPrompts | None = None,
    ) -> None:
        check_uld_tokenizer("teacher", tokenizer)
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
        """Encode a row for the student. Raises ValueError if either tokenizer cannot encode it."""
        example = self._student_encoder(row)
        prompt = tuple(example.prompt_ids)
        if not isinstance(row, Example) and prompt not in self.teacher_prompts:
            try:
                self.teacher_prompts[prompt] = self._teacher_encoder(row).prompt_ids
            except ValueError as error:
                raise ValueError(f"uld: with the teacher's tokenizer: {error}") from error
            if len(self.teacher_prompts) > self._max_prompts:
                del self.teacher_prompts[next(iter(self.teacher_prompts))]
        return example


class TextTeacher:
    """Lets a teacher read the student's rows as text; the `TextReader` of the loss `ULD`.

    Args:
        teacher: The run's first teacher.
        tokenizer: The teacher's own, a fast one.
        student_tokenizer: The tokenizer of the rows' ids, a fast one.
        end_ids: Every id that ends a student's completion.
        teacher_prompts: Prompts in the teacher's ids. Others are decoded without special tokens, which loses
            what a chat template wrote and what the student's tokenizer has no token for.

    Raises:
        ValueError: for a tokenizer that is not fast or has no end of sequence.
    """

    def __init__(
        self,
        teacher: TeacherInterface,
        tokenizer: Any,
        student_tokenizer: Any,
        end_ids: Collection[int],
        teacher_prompts: TeacherPrompts | None = None,
    ) -> None:
        check_uld_tokenizer("teacher", tokenizer)
        check_uld_tokenizer("student", student_tokenizer)
        assert teacher.config is not None, "a teacher of texts is a model"
        self.teacher, self.tokenizer, self.student_tokenizer = teacher, tokenizer, student_tokenizer
        self.is_encoder_decoder = bool(teacher.config.is_encoder_decoder)
        self.end_ids = frozenset(end_ids)
        self.teacher_prompts = {} if teacher_prompts is None else teacher_prompts
        self._student_special_ids, self._special_ids = (
            non_text_ids(student_tokenizer),
            non_text_ids(tokenizer),
        )
        # A sharded teacher gives its head back after each use, and all ranks have to run it together.
        self._caches_last_reading = not (isinstance(teacher, LiveTeacher) and teacher.is_sharded)
        self._last_reading: tuple[list[Example], TextTeacherLogits] | None = None

    def activate(self) -> AbstractContextManager[Any]:
        """Return a context within which the teacher's weights are on the device."""
        return self.teacher.activate()

    def read_rows(self, rows: Sequences) -> TextTeacherLogits:
        """Return the teacher's logits, its own tokens and the shared spans for the texts of student rows (B).

        Cells of a pack that share their rows ask one after another: the last rows are read once.
        """
        prompts = _list_real_ids(rows.prompt_ids, rows.prompt_mask)
        completions = _list_real_ids(rows.completion_ids, rows.completion_mask)
        examples = [Example(*pair) for pair in zip(prompts, completions, strict=True)]
        if self._last_reading is None or self._last_reading[0] != examples or not self._caches_last_reading:
            self._last_reading = examples, self._score_examples(examples, rows)
        return self._last_reading[1]

    def _score_examples(self, examples: Sequence[Example], rows: Sequences) -> TextTeacherLogits:
        """Translate examples into the teacher's tokens; return its logits, those tokens and shared spans."""
        translations = [self._translate_example(example) for example in examples]
        batch = collate_examples(
            [example for example, _ in translations],
            self.tokenizer.pad_token_id,
            is_encoder_decoder=self.is_encoder_decoder,
        ).to(rows.prompt_ids.device)
        logits = self.teacher.compute_output(MicroBatch(batch, batch, (0,), (False,))).logits
        return TextTeacherLogits(logits, batch.completion_ids, [spans for _, spans in translations])

    def _translate_example(self, example: Example) -> tuple[Example, list[Span]]:
        """Return the example in the teacher's tokens, and the spans that both tokenizations share."""
        decoded = decode_completion(
            self.student_tokenizer, example.completion_ids, self.end_ids, self._student_special_ids
        )
        ids, ends = encode_completion(
            self.tokenizer, decoded, self._special_ids, is_encoder_decoder=self.is_encoder_decoder
        )
        return Example(self._translate_prompt(example.prompt_ids), ids), align_spans(decoded.ends, ends)

    def _translate_prompt(self, ids: list[int]) -> list[int]:
        """Return a prompt in the teacher's ids: the known ones, else its decoded text tokenized again."""
        known_prompt = self.teacher_prompts.get(tuple(ids))
        if known_prompt is not None:
            return list(known_prompt)
        text = self.student_tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return tokenize_prompts(self.tokenizer, [text], is_encoder_decoder=self.is_encoder_decoder)[0]


def _list_real_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return each row's ids where its mask is set, as a list."""
    return [row[is_real.bool()].tolist() for row, is_real in zip(ids, mask, strict=True)]
