"""A teacher that reads a student's rows as text, in its own tokens and with its own conventions.

Shapes: B rows, D completion tokens of the teacher's.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from gkd_lab.encoding.batches import Example, collate
from gkd_lab.encoding.tokenization import prompt_ids
from gkd_lab.losses.step_loss import StepBatch
from gkd_lab.losses.token_spans import Span, check_tells_ends, no_text, spans, spelled, told
from gkd_lab.losses.uld import Reading
from gkd_lab.models.forward import Sequences
from gkd_lab.teachers.teacher import LiveTeacher, Teaching
from gkd_lab.teachers.teacher_prompts import Prompts


class TextTeacher:
    """What `Uld` asks of a teacher.

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
        teacher: Teaching,
        tokenizer: Any,
        student_tokenizer: Any,
        end_ids: Collection[int],
        prompts: Prompts | None = None,
    ) -> None:
        for owner, one in (("teacher", tokenizer), ("student", student_tokenizer)):
            check_tells_ends(owner, one)
        assert teacher.config is not None, "a teacher of texts is a model"
        self.teacher, self.tokenizer, self.student_tokenizer = teacher, tokenizer, student_tokenizer
        self.is_encoder_decoder = bool(teacher.config.is_encoder_decoder)
        self.end_ids, self.prompts = frozenset(end_ids), {} if prompts is None else prompts
        self._special = no_text(student_tokenizer), no_text(tokenizer)
        # A sharded teacher gives its head back after each use, and all ranks have to run it together.
        self._keeps = not (isinstance(teacher, LiveTeacher) and teacher.is_sharded)
        self._last: tuple[list[Example], Reading] | None = None

    def at_work(self) -> AbstractContextManager[Any]:
        """Its weights are on the device within."""
        return self.teacher.at_work()

    def reading(self, rows: Sequences) -> Reading:
        """What it makes of the texts of a student's rows, (B) of them.

        Cells of a pack that share their rows ask for them one after another: these are read once.
        """
        prompts = _listed(rows.prompt_ids, rows.prompt_mask)
        completions = _listed(rows.completion_ids, rows.completion_mask)
        asked = [Example(*pair) for pair in zip(prompts, completions, strict=True)]
        if self._last is None or self._last[0] != asked or not self._keeps:
            self._last = asked, self._read(asked, rows)
        return self._last[1]

    def _read(self, asked: Sequence[Example], rows: Sequences) -> Reading:
        found = [self._row(row) for row in asked]
        batch = collate(
            [own for own, _ in found], self.tokenizer.pad_token_id, is_encoder_decoder=self.is_encoder_decoder
        ).to(rows.prompt_ids.device)
        guide = self.teacher.says(StepBatch(batch, batch, (0,), (False,))).guide
        return Reading(guide, batch.completion_ids, [of_row for _, of_row in found])

    def _row(self, row: Example) -> tuple[Example, list[Span]]:
        """The row in the teacher's tokens, and the spans of both."""
        own, theirs = self._special
        said = told(self.student_tokenizer, row.completion_ids, self.end_ids, own)
        ids, ends = spelled(self.tokenizer, said, theirs, is_encoder_decoder=self.is_encoder_decoder)
        return Example(self._prompt(row.prompt_ids), ids), spans(said.ends, ends)

    def _prompt(self, ids: list[int]) -> list[int]:
        known = self.prompts.get(tuple(ids))
        if known is not None:
            return list(known)
        text = self.student_tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        (found,) = prompt_ids(self.tokenizer, [text], is_encoder_decoder=self.is_encoder_decoder)
        return found


def _listed(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
