"""Cached teacher scores of a training split: computed once under a lock, shared by all cells.

All rows are scored, also for a cell that trains on the first rows only, so that both share one artifact.
"""

from functools import partial

import torch

from gkd_lab.config.artifact_specs import TeacherScoresSpec
from gkd_lab.models.build import hide_progress_bars, load_tokenizer
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import encode_examples, load_split
from gkd_lab.runner.memory import release_memory
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.teacher_text import apply_teacher_text, ensure_teacher_text
from gkd_lab.store import Record
from gkd_lab.store.heartbeat import require_lock
from gkd_lab.store.provenance import collect_provenance
from gkd_lab.tables.failure_causes import RETRY_HINT
from gkd_lab.teachers.cached_teachers import CachedTeacher
from gkd_lab.teachers.score_writer import write_teacher_scores

SCORES_FOLDER, TOKENIZER_FOLDER = "scores", "tokenizer"


def ensure_teacher_scores(scores: TeacherScoresSpec, scale: str, options: RunOptions) -> Record:
    """Return the record of a teacher's scores, computed now if missing; it may be a stored failed record.

    Raises RecordedFailure where computing fails now; `load_cached_teacher` raises for a failed record.
    """
    record = options.store.get_teacher_scores(scale, scores)
    build = partial(_write_teacher_scores, scores=scores, scale=scale, options=options)
    artifacts.ensure_teacher_output(record, "teacher's scores", build, options)
    release_memory()
    return record


def load_cached_teacher(record: Record) -> CachedTeacher:
    """Return a teacher that reads its scores from a done record, with its tokenizer. ValueError if failed."""
    status = record.read_status()
    if status.get("state") != "done":
        raise ValueError(
            f"the teacher's scores failed: {status.get('error')} (see {record.status_file}; {RETRY_HINT})"
        )
    folder = record.folder / SCORES_FOLDER
    return CachedTeacher(folder, load_tokenizer(folder / TOKENIZER_FOLDER))


def _write_teacher_scores(record: Record, scores: TeacherScoresSpec, scale: str, options: RunOptions) -> None:
    """Score every training row's completion by the teacher, write the scores, and mark the record done."""
    record.write_spec(scores)
    teacher = artifacts.load_artifact(
        artifacts.ensure_artifact("teacher", scores.teacher, scale, options), scores.teacher
    )
    rows = load_split(scores.task, scores.data, "train", options.cache_folder)
    examples, _ = encode_examples(scores.teacher, teacher.tokenizer, rows)
    if scores.text_spec is not None:
        examples = apply_teacher_text(examples, ensure_teacher_text(scores.text_spec, scale, options))
    folder = record.folder / SCORES_FOLDER
    phase = f"{scores.task}: teacher's scores of {len(examples)} rows"
    with options.reporter.phase(
        phase, len(examples), folders=[record.folder], work="scores"
    ) as update_progress:
        write_teacher_scores(
            teacher.model.to(select_device()),
            examples,
            folder,
            pad_id=teacher.tokenizer.pad_token_id,
            top_k=scores.scores.top_k,
            dtype=scores.scores.dtype,
            use_bfloat16=scores.precision == "bf16",
            report_progress=update_progress,
        )
    require_lock(folder)
    with hide_progress_bars():
        teacher.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    record.write_provenance(collect_provenance(threads=torch.get_num_threads(), device=select_device()))
    record.finish(
        rows=len(examples),
        tokens=sum(len(example.completion_ids) for example in examples),
        bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
