"""What a teacher writes for every training prompt: once, under a lock, for all cells that ask for it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from gkd_lab.config.artifact_specs import TeacherTextSpec
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import encode_examples, load_split
from gkd_lab.runner.failures import record_failures
from gkd_lab.runner.repair import find_damaged_file, quarantine_damaged_result
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.store import Record
from gkd_lab.store.files import read_json_lines, write_json_lines
from gkd_lab.store.provenance import collect_provenance
from gkd_lab.training.sampling import collect_end_ids, generate_completions

BATCH_ROWS = 256
TEXTS_FILE = "texts.jsonl"


def ensure_teacher_text(text: TeacherTextSpec, scale: str, options: RunOptions) -> Record:
    """The finished record of a teacher's text; written now if it is not there. Raises PartFailed."""
    record = options.store.get_teacher_text(scale, text)
    if record.read_status().get("state") != "done" or find_damaged_file(record) is not None:
        with artifacts.hold_record_lock(record, "teacher's text", options):
            quarantine_damaged_result(record, options)
            if options.retry_failed:
                record.clear_failure()
            if not record.read_status():
                with record_failures([record], options.outputs):
                    _write_teacher_text(text, scale, record, options)
    return record


def apply_teacher_text(examples: Sequence[Example], record: Record) -> list[Example]:
    """The same prompts, completed by the teacher."""
    status = record.read_status()
    if status.get("state") != "done":
        raise ValueError(f"the teacher's text failed: {status.get('error')} (see {record.status_file})")
    lines = read_json_lines(record.folder / TEXTS_FILE)
    if len(lines) != len(examples):
        raise ValueError(
            f"{record.folder / TEXTS_FILE} has {len(lines)} texts for {len(examples)} prompts: delete it"
        )
    return [replace(row, completion_ids=line["ids"]) for row, line in zip(examples, lines, strict=True)]


def _write_teacher_text(text: TeacherTextSpec, scale: str, record: Record, options: RunOptions) -> None:
    record.write_spec(text)
    teacher = artifacts.load_artifact(
        artifacts.ensure_artifact("teacher", text.teacher, scale, options), text.teacher
    )
    teacher.model.to(select_device())
    found, _ = encode_examples(
        text.teacher, teacher.tokenizer, load_split(text.task, text.data, "train", options.cache_folder)
    )
    name = f"{text.task}: teacher's text for {len(found)} prompts"
    with options.reporter.phase(name, len(found)) as advance:
        written = _generate_completions(text, teacher, found, advance)
    ends = set(collect_end_ids(teacher.model, teacher.tokenizer).tolist())
    texts = teacher.tokenizer.batch_decode(written, skip_special_tokens=True)
    lines = [
        {"text": said, "ended": ids[-1] in ends, "ids": ids} for said, ids in zip(texts, written, strict=True)
    ]
    write_json_lines(record.folder / TEXTS_FILE, lines)
    record.write_provenance(collect_provenance(threads=torch.get_num_threads(), device=select_device()))
    cut = sum(not line["ended"] for line in lines)
    record.finish(rows=len(lines), truncated=cut / max(1, len(lines)))


def _generate_completions(
    text: TeacherTextSpec,
    teacher: artifacts.LoadedModel,
    examples: Sequence[Example],
    advance: Callable[[int], None],
) -> list[list[int]]:
    """Token ids of each row's answer, in the rows' order; rows of like length are answered together."""
    how, tokenizer = text.text, teacher.tokenizer
    noise = None
    if how.decoding == "sample":
        noise = draw_uniforms(how.seed, 0, "teacher's text", len(examples), text.max_output_tokens)
    order = sorted(range(len(examples)), key=lambda n: len(examples[n].prompt_ids))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), BATCH_ROWS):
        chosen = order[first : first + BATCH_ROWS]
        prompts = collate_examples(
            [examples[n] for n in chosen],
            tokenizer.pad_token_id,
            is_encoder_decoder=teacher.model.config.is_encoder_decoder,
        ).to(teacher.model.device)
        done = generate_completions(
            teacher.model,
            prompts,
            max_new_tokens=text.max_output_tokens,
            end_ids=collect_end_ids(teacher.model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            uniforms=None if noise is None else noise[chosen],
            temperature=how.temperature or 1.0,
            num_beams=how.num_beams or 1,
            length_penalty=how.length_penalty or 0.0,
        )
        for n, ids, mask in zip(chosen, done.completion_ids, done.completion_mask.bool(), strict=True):
            answers[n] = ids[mask].tolist()
        advance(len(answers))
    return [answers[n] for n in range(len(examples))]
