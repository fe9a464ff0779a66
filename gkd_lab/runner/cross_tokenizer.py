"""What a run needs where teacher and student have two tokenizers: rows of one in the other's tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from gkd_lab.config.cell import Cell, Training
from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.tokenization import ensure_end_id, tokenize_targets
from gkd_lab.losses.registry import build_term
from gkd_lab.losses.terms import needs_text_reader, required_teachers
from gkd_lab.models.build import load_tokenizer
from gkd_lab.models.vocabulary import MISMATCH_ADVICE, find_tokenizer_difference
from gkd_lab.runner.dataset import encode_examples, load_split
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.teacher_text import TEXTS_FILE
from gkd_lab.store import Record
from gkd_lab.store.files import read_json_lines
from gkd_lab.teachers.text_teacher import TeacherPrompts


def check_shared_tokenizer(teacher: Any, student: Any, cells: Iterable[Cell]) -> None:
    """Raises ValueError where a cell compares token by token with a first teacher of other tokens."""
    listed = [[build_term(one) for one in cell.training.objectives] for cell in cells]
    difference = (
        find_tokenizer_difference(student, teacher) if 0 in required_teachers(map(tuple, listed)) else None
    )
    if difference is not None:
        raise ValueError(
            "teacher and student do not share a tokenizer, so their distributions cannot be compared: "
            f"{difference}; {MISMATCH_ADVICE}"
        )


def map_teacher_prompts(
    teacher: Any, student: Sequence[Example], cells: Iterable[Cell], options: RunOptions
) -> TeacherPrompts | None:
    """How the teacher reads the training prompts, where an objective lets it read texts.

    teacher: its tokenizer. student: all examples of the first rows of the split, in their order.
    """
    listed = list(cells)
    first = listed[0].training
    if not needs_text_reader(tuple(map(build_term, cell.training.objectives)) for cell in listed):
        return None
    data = load_split(first.task, first.data, "train", options.cache_folder)
    found, _ = encode_examples(first.teacher, teacher, data.take_first(len(student)))
    pairs = zip(student, found, strict=True)
    return {tuple(own.prompt_ids): theirs.prompt_ids for own, theirs in pairs}


def retokenize_completions(
    examples: Sequence[Example], teacher_text: Record, training: Training, teacher: Record, tokenizer: Any
) -> list[Example]:
    """Rows that the teacher completed, in the student's tokens where those are not the teacher's.

    text: what the teacher wrote. teacher: its record. tokenizer: the student's.
    """
    if find_tokenizer_difference(tokenizer, load_tokenizer(teacher.checkpoint)) is None:
        return list(examples)
    lines = read_json_lines(teacher_text.folder / TEXTS_FILE)
    family = training.start.family == "encoder-decoder"
    spelt = tokenize_targets(tokenizer, [line["text"] for line in lines], is_encoder_decoder=family)
    end = tokenizer.eos_token_id
    return [
        replace(
            row,
            completion_ids=_truncate_completion(
                ids, end, is_ended=line["ended"], max_tokens=training.max_output_tokens
            ),
        )
        for row, line, ids in zip(examples, lines, spelt, strict=True)
    ]


def _truncate_completion(ids: list[int], end_id: int, *, is_ended: bool, max_tokens: int) -> list[int]:
    if is_ended:
        return ensure_end_id(ids, [end_id])[:max_tokens]
    return (ids[:-1] if ids[-1:] == [end_id] else ids)[:max_tokens]
