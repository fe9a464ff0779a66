"""What a teacher says of every token of a training split: once, under a lock, for all cells that ask for it.

All rows are scored, also where a cell distils on the first ones only, so that both share one artifact.
"""

from collections.abc import Sequence
from typing import Any

import torch

from gkd_lab.config.artifact_specs import TeacherScoresSpec
from gkd_lab.encoding.batches import Example
from gkd_lab.models.build import hide_progress_bars, load_tokenizer
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import encode_examples, load_split
from gkd_lab.runner.failures import record_failures
from gkd_lab.runner.memory import release_memory
from gkd_lab.runner.repair import find_damaged_file, quarantine_damaged_result
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.teacher_text import apply_teacher_text, ensure_teacher_text
from gkd_lab.store import Record
from gkd_lab.store.provenance import collect_provenance
from gkd_lab.teachers.cached_teachers import CachedTeacher
from gkd_lab.teachers.score_writer import write_teacher_scores

SCORES_FOLDER, TOKENIZER_FOLDER = "scores", "tokenizer"


def ensure_teacher_scores(scores: TeacherScoresSpec, scale: str, options: RunOptions) -> Record:
    """The finished record of a teacher's scores; made now if it is not there. Raises PartFailed."""
    record = options.store.get_teacher_scores(scale, scores)
    if record.read_status().get("state") != "done" or find_damaged_file(record) is not None:
        with artifacts.hold_record_lock(record, "teacher's scores", options):
            quarantine_damaged_result(record, options)
            if options.retry_failed:
                record.clear_failure()
            if not record.read_status():
                with record_failures([record], options.outputs):
                    _write_teacher_scores(scores, scale, record, options)
                release_memory()
    return record


def load_cached_teacher(record: Record) -> CachedTeacher:
    """The finished scores in the place of the teacher, with its tokenizer. Its model is not loaded."""
    status = record.read_status()
    if status.get("state") != "done":
        raise ValueError(
            f"the teacher's scores failed: {status.get('error')} (see {record.status_file}; --retry-failed "
            "tries again)"
        )
    folder = record.folder / SCORES_FOLDER
    return CachedTeacher(folder, load_tokenizer(folder / TOKENIZER_FOLDER))


def _write_teacher_scores(scores: TeacherScoresSpec, scale: str, record: Record, options: RunOptions) -> None:
    record.write_spec(scores)
    teacher = artifacts.load_artifact(
        artifacts.ensure_artifact("teacher", scores.teacher, scale, options), scores.teacher
    )
    found, _ = encode_examples(
        scores.teacher, teacher.tokenizer, load_split(scores.task, scores.data, "train", options.cache_folder)
    )
    if scores.text_spec is not None:
        found = apply_teacher_text(found, ensure_teacher_text(scores.text_spec, scale, options))
    folder = record.folder / SCORES_FOLDER
    with options.reporter.phase(
        f"{scores.task}: teacher's scores of {len(found)} rows", len(found)
    ) as advance:
        write_teacher_scores(
            teacher.model.to(select_device()),
            found,
            folder,
            pad_id=teacher.tokenizer.pad_token_id,
            top_k=scores.scores.top_k,
            dtype=scores.scores.dtype,
            use_bfloat16=scores.precision == "bf16",
            report_progress=advance,
        )
    with hide_progress_bars():
        teacher.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    record.write_provenance(collect_provenance(threads=torch.get_num_threads(), device=select_device()))
    record.finish(**_count_scores(record, found))


def _count_scores(record: Record, examples: Sequence[Example]) -> dict[str, Any]:
    files = (record.folder / SCORES_FOLDER).glob("*.safetensors")
    tokens = sum(len(row.completion_ids) for row in examples)
    return {"rows": len(examples), "tokens": tokens, "bytes": sum(file.stat().st_size for file in files)}
