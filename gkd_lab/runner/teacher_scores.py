"""What a teacher says of every token of a training split: once, under a lock, for all cells that ask for it.

All rows are scored, also where a cell distils on the first ones only, so that both share one artifact.
"""

from collections.abc import Sequence
from typing import Any

import torch

from gkd_lab.config.cell import ScoresSpec
from gkd_lab.encoding.batches import Example
from gkd_lab.models.build import load_tokenizer, quiet
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import examples, rows
from gkd_lab.runner.failures import kept_by
from gkd_lab.runner.memory import release
from gkd_lab.runner.repair import damaged_file, mend_finished
from gkd_lab.runner.run_options import RunOptions, device
from gkd_lab.runner.teacher_text import ensure_text, with_teacher_text
from gkd_lab.store import Record
from gkd_lab.store.provenance import provenance
from gkd_lab.teachers.cached_teachers import StoredTeacher
from gkd_lab.teachers.score_writer import write_scores

FOLDER, TOKENIZER = "scores", "tokenizer"


def ensure_scores(scores: ScoresSpec, scale: str, options: RunOptions) -> Record:
    """The finished record of a teacher's scores; made now if it is not there. Raises PartFailed."""
    record = options.store.scores(scale, scores)
    if record.status().get("state") != "done" or damaged_file(record) is not None:
        with artifacts.waited_for(record, "teacher's scores", options):
            mend_finished(record, options)
            if options.retry_failed:
                record.forget_failure()
            if not record.status():
                with kept_by([record], options.outputs):
                    _write(scores, scale, record, options)
                release()
    return record


def stored_teacher(record: Record) -> StoredTeacher:
    """The finished scores in the place of the teacher, with its tokenizer. Its model is not loaded."""
    status = record.status()
    if status.get("state") != "done":
        raise ValueError(
            f"the teacher's scores failed: {status.get('error')} (see {record.status_file}; --retry-failed "
            "tries again)"
        )
    folder = record.folder / FOLDER
    return StoredTeacher(folder, load_tokenizer(folder / TOKENIZER))


def _write(scores: ScoresSpec, scale: str, record: Record, options: RunOptions) -> None:
    record.describe(scores)
    teacher = artifacts.load(artifacts.ensure("teacher", scores.teacher, scale, options), scores.teacher)
    found, _ = examples(
        scores.teacher, teacher.tokenizer, rows(scores.task, scores.data, "train", options.cache)
    )
    if scores.written is not None:
        found = with_teacher_text(found, ensure_text(scores.written, scale, options))
    folder = record.folder / FOLDER
    with options.reporter.phase(
        f"{scores.task}: teacher's scores of {len(found)} rows", len(found)
    ) as advance:
        write_scores(
            teacher.model.to(device()),
            found,
            folder,
            pad_id=teacher.tokenizer.pad_token_id,
            top_k=scores.scores.top_k,
            dtype=scores.scores.dtype,
            lowered=scores.precision == "bf16",
            advance=advance,
        )
    with quiet():
        teacher.tokenizer.save_pretrained(folder / TOKENIZER)
    record.write_provenance(provenance(threads=torch.get_num_threads(), device=device()))
    record.finish(**_facts(record, found))


def _facts(record: Record, found: Sequence[Example]) -> dict[str, Any]:
    files = (record.folder / FOLDER).glob("*.safetensors")
    tokens = sum(len(row.completion_ids) for row in found)
    return {"rows": len(found), "tokens": tokens, "bytes": sum(file.stat().st_size for file in files)}
