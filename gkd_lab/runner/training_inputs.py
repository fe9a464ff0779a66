"""Load what a training of cells reads: the SFT student, the teachers and the examples."""

from collections.abc import Sequence
from typing import Any

from gkd_lab.config.cell import Cell, Role
from gkd_lab.encoding.batches import Example
from gkd_lab.models.build import PRECISION_DTYPES, load_tokenizer
from gkd_lab.runner import artifacts
from gkd_lab.runner.cross_tokenizer import retokenize_completions
from gkd_lab.runner.dataset import (
    assign_teachers,
    corrupt_completions,
    encode_examples,
    load_split,
    write_split_report,
)
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.student_files import choose_precision
from gkd_lab.runner.teacher_scores import ensure_teacher_scores, load_cached_teacher
from gkd_lab.runner.teacher_text import apply_teacher_text, ensure_teacher_text
from gkd_lab.store import Record
from gkd_lab.teachers.cached_teachers import ServerTeacher
from gkd_lab.teachers.score_writer import number_examples
from gkd_lab.teachers.server import TeacherServer
from gkd_lab.teachers.teacher import Teacher


def load_sft_student(cell: Cell, options: RunOptions) -> artifacts.LoadedModel:
    """Return the cell's SFT student in fp32, or in fp64 for an fp64 training; build it first if missing."""
    student = cell.training.start
    loaded = artifacts.load_artifact(
        artifacts.ensure_artifact("start", student, cell.scale, options), student
    )
    loaded.model.to(PRECISION_DTYPES[choose_precision(cell.training)])
    return loaded


def load_teacher(cell: Cell, options: RunOptions) -> artifacts.LoadedModel:
    """Return the first teacher: client of its server, reader of its cached scores, or the live model."""
    teacher, scores = cell.training.teacher, cell.training.scores_spec
    if teacher.model.served is not None:
        return _connect_served_teacher(cell, options)
    if scores is not None:
        cached_teacher = load_cached_teacher(ensure_teacher_scores(scores, cell.scale, options))
        return artifacts.LoadedModel(cached_teacher, cached_teacher.tokenizer)
    return artifacts.load_artifact(
        artifacts.ensure_artifact("teacher", teacher, cell.scale, options), teacher
    )


def _connect_served_teacher(cell: Cell, options: RunOptions) -> artifacts.LoadedModel:
    """Return a client of the teacher's server as model, with the tokenizer that the spec names.

    Without a name it is the SFT student's, which is built if missing.
    """
    model, student = cell.training.teacher.model, cell.training.start
    tokenizer_source = (
        model.path
        or model.pretrained
        or artifacts.ensure_artifact("start", student, cell.scale, options).checkpoint
    )
    assert model.server and model.served and model.top_k, "the spec of a served teacher is complete"
    patience = {} if model.patience is None else {"patience": model.patience}
    server = TeacherServer(model.server, model.served, model.top_k, **patience)
    teacher = ServerTeacher(server, load_tokenizer(tokenizer_source))
    return artifacts.LoadedModel(teacher, teacher.tokenizer)


def load_extra_teachers(cell: Cell, options: RunOptions) -> list[Teacher]:
    """Return the cell's teachers 1, 2, ... in order, without the first (0); build them if missing."""
    training = cell.training
    teachers = []
    for index, model in enumerate(training.teachers, start=1):
        role: Role = "start" if model == training.start else "teacher"
        loaded = artifacts.load_artifact(artifacts.ensure_artifact(role, model, cell.scale, options), model)
        teachers.append(Teacher(loaded.model, *training.get_teacher_placement(index), loaded.tokenizer))
    return teachers


def load_examples(
    cell: Cell, tokenizer: Any, records: Sequence[Record], options: RunOptions
) -> list[Example]:
    """Return the cell's examples in the student's tokens, the first `train_rows` of the training split.

    Completions are the teacher's, or corrupted, where the spec asks for that. records: those of the pack;
    each stores the counts of truncated and omitted rows.
    """
    training = cell.training
    samples = None if training.source.text is None else training.source.text.samples
    rows = load_split(training.task, training.data, "train", options.cache_folder)
    examples, report = encode_examples(training.start, tokenizer, rows)
    examples = assign_teachers(examples, rows, training.objectives)
    for record in records:
        write_split_report(record.folder, "train", report)
    if training.text_spec is not None:
        teacher_text = ensure_teacher_text(training.text_spec, cell.scale, options)
        teacher = options.store.get_artifact(cell.scale, "teacher", training.teacher)
        if samples is not None:  # the teacher wrote for these rows alone
            examples = examples[: training.train_rows]
        examples = apply_teacher_text(examples, teacher_text, samples)
        examples = retokenize_completions(examples, teacher_text, training, teacher, tokenizer)
    if training.scores_spec is not None:
        examples = number_examples(examples)
    examples = examples[: training.train_rows] if samples is None else examples
    corrupted = training.source.corrupted
    return examples if corrupted is None else corrupt_completions(examples, corrupted, tokenizer)
