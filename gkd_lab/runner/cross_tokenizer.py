"""What a run needs where teacher and student have two tokenizers: rows of one in the other's tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from gkd_lab.config.cell import Cell, Training
from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.tokenization import ended, target_ids
from gkd_lab.losses.registry import term_of
from gkd_lab.losses.terms import reads_texts, teachers_read
from gkd_lab.models.build import load_tokenizer
from gkd_lab.models.vocabulary import WAY_OUT, same_tokenizer
from gkd_lab.runner.dataset import examples, rows
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.teacher_text import FILE
from gkd_lab.store import Record
from gkd_lab.store.files import read_lines
from gkd_lab.teachers.teacher_prompts import Prompts


def check_tokenizers(teacher: Any, student: Any, cells: Iterable[Cell]) -> None:
    """Raises ValueError where a cell compares token by token with a first teacher of other tokens."""
    listed = [[term_of(one) for one in cell.training.objectives] for cell in cells]
    difference = same_tokenizer(student, teacher) if 0 in teachers_read(map(tuple, listed)) else None
    if difference is not None:
        raise ValueError(
            "teacher and student do not share a tokenizer, so their distributions cannot be compared: "
            f"{difference}; {WAY_OUT}"
        )


def teacher_prompts(
    teacher: Any, student: Sequence[Example], cells: Iterable[Cell], options: RunOptions
) -> Prompts | None:
    """How the teacher reads the training prompts, where an objective lets it read texts.

    teacher: its tokenizer. student: all examples of the first rows of the split, in their order.
    """
    listed = list(cells)
    first = listed[0].training
    if not reads_texts(tuple(map(term_of, cell.training.objectives)) for cell in listed):
        return None
    data = rows(first.task, first.data, "train", options.cache)
    found, _ = examples(first.teacher, teacher, data.first(len(student)))
    pairs = zip(student, found, strict=True)
    return {tuple(own.prompt_ids): theirs.prompt_ids for own, theirs in pairs}


def in_own_tokens(
    found: Sequence[Example], text: Record, training: Training, teacher: Record, tokenizer: Any
) -> list[Example]:
    """Rows that the teacher completed, in the student's tokens where those are not the teacher's.

    text: what the teacher wrote. teacher: its record. tokenizer: the student's.
    """
    if same_tokenizer(tokenizer, load_tokenizer(teacher.checkpoint)) is None:
        return list(found)
    lines = read_lines(text.folder / FILE)
    family = training.start.family == "encoder-decoder"
    spelt = target_ids(tokenizer, [line["text"] for line in lines], is_encoder_decoder=family)
    end = tokenizer.eos_token_id
    return [
        replace(row, completion_ids=_limited(ids, end, ends=line["ended"], most=training.max_output_tokens))
        for row, line, ids in zip(found, lines, spelt, strict=True)
    ]


def _limited(ids: list[int], end: int, *, ends: bool, most: int) -> list[int]:
    if ends:
        return ended(ids, [end])[:most]
    return (ids[:-1] if ids[-1:] == [end] else ids)[:most]
