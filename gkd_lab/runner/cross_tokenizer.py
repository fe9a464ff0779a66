"""Training data for teachers with another tokenizer than the student's."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from gkd_lab.config.cell import Cell, Training
from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.tokenization import tokenize_targets
from gkd_lab.losses.build_terms import build_term
from gkd_lab.losses.terms import needs_text_reader, required_teachers
from gkd_lab.models.build import load_tokenizer
from gkd_lab.models.vocabulary import MISMATCH_ADVICE, find_tokenizer_difference
from gkd_lab.runner.dataset import encode_examples, load_split, take_first_rows
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.teacher_text import TEXTS_FILE
from gkd_lab.store import Record
from gkd_lab.store.files import read_json_lines
from gkd_lab.teachers.text_teacher import TeacherPrompts


def check_shared_tokenizer(teacher_tokenizer: Any, student_tokenizer: Any, cells: Iterable[Cell]) -> None:
    """Raise ValueError if the tokenizers differ and a cell's loss compares teacher 0's distributions."""
    if 0 not in required_teachers(tuple(map(build_term, cell.training.objectives)) for cell in cells):
        return
    difference = find_tokenizer_difference(student_tokenizer, teacher_tokenizer)
    if difference is not None:
        raise ValueError(
            "teacher and student do not share a tokenizer, so their distributions cannot be compared: "
            f"{difference}; {MISMATCH_ADVICE}"
        )


def map_teacher_prompts(
    teacher_tokenizer: Any, examples: Sequence[Example], cells: Sequence[Cell], options: RunOptions
) -> TeacherPrompts | None:
    """Return {student's ids of a prompt: teacher's ids of it} for all examples; None if no term reads text.

    Such a term lets the teacher read texts in its own tokens. examples: the student's, of the first rows of
    the split, in order.
    """
    if not needs_text_reader(tuple(map(build_term, cell.training.objectives)) for cell in cells):
        return None
    training = cells[0].training
    rows = load_split(training.task, training.data, "train", options.cache_folder)
    teacher_examples, _ = encode_examples(
        training.teacher, teacher_tokenizer, take_first_rows(rows, len(examples))
    )
    return {
        tuple(example.prompt_ids): teacher_example.prompt_ids
        for example, teacher_example in zip(examples, teacher_examples, strict=True)
    }


def retokenize_completions(
    examples: Sequence[Example], teacher_text: Record, training: Training, teacher: Record, tokenizer: Any
) -> list[Example]:
    """Return the examples with the teacher's stored texts, tokenized by `tokenizer`, as completions.

    Where both tokenizers agree, the examples are returned unchanged. tokenizer: the student's. teacher_text:
    the record of the texts. teacher: the record of the model that wrote them.
    """
    if find_tokenizer_difference(tokenizer, load_tokenizer(teacher.checkpoint)) is None:
        return list(examples)
    completions = read_json_lines(teacher_text.folder / TEXTS_FILE)
    completion_ids = tokenize_targets(
        tokenizer,
        [completion["text"] for completion in completions],
        is_encoder_decoder=training.start.family == "encoder-decoder",
    )
    return [
        replace(
            example,
            completion_ids=_truncate_completion(
                ids,
                tokenizer.eos_token_id,
                is_ended=completion["ended"],
                max_tokens=training.max_output_tokens,
            ),
        )
        for example, completion, ids in zip(examples, completions, completion_ids, strict=True)
    ]


def _truncate_completion(ids: list[int], end_id: int, *, is_ended: bool, max_tokens: int) -> list[int]:
    """Add a missing end id if `is_ended`, else remove a last one; then return the first `max_tokens` ids."""
    text_ids = ids[:-1] if ids[-1:] == [end_id] else ids
    return [*text_ids, *([end_id] if is_ended else [])][:max_tokens]
