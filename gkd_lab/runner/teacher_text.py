"""What a teacher writes for every training prompt: once, under a lock, for all cells that ask for it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from gkd_lab.config.cell import TextSpec
from gkd_lab.encoding.batches import Example, collate
from gkd_lab.models.rng import uniforms
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import examples, rows
from gkd_lab.runner.failures import kept_by
from gkd_lab.runner.repair import damaged_file, mend_finished
from gkd_lab.runner.run_options import RunOptions, device
from gkd_lab.store import Record
from gkd_lab.store.files import read_lines, write_lines
from gkd_lab.store.provenance import provenance
from gkd_lab.training.sampling import end_ids, write

ROWS_AT_ONCE = 256
FILE = "texts.jsonl"


def ensure_text(text: TextSpec, scale: str, options: RunOptions) -> Record:
    """The finished record of a teacher's text; written now if it is not there. Raises PartFailed."""
    record = options.store.text(scale, text)
    if record.status().get("state") != "done" or damaged_file(record) is not None:
        with artifacts.waited_for(record, "teacher's text", options):
            mend_finished(record, options)
            if options.retry_failed:
                record.forget_failure()
            if not record.status():
                with kept_by([record], options.outputs):
                    _write(text, scale, record, options)
    return record


def with_teacher_text(found: Sequence[Example], record: Record) -> list[Example]:
    """The same prompts, completed by the teacher."""
    status = record.status()
    if status.get("state") != "done":
        raise ValueError(f"the teacher's text failed: {status.get('error')} (see {record.status_file})")
    lines = read_lines(record.folder / FILE)
    if len(lines) != len(found):
        raise ValueError(f"{record.folder / FILE} has {len(lines)} texts for {len(found)} prompts: delete it")
    return [replace(row, completion_ids=line["ids"]) for row, line in zip(found, lines, strict=True)]


def _write(text: TextSpec, scale: str, record: Record, options: RunOptions) -> None:
    record.describe(text)
    teacher = artifacts.load(artifacts.ensure("teacher", text.teacher, scale, options), text.teacher)
    teacher.model.to(device())
    found, _ = examples(text.teacher, teacher.tokenizer, rows(text.task, text.data, "train", options.cache))
    name = f"{text.task}: teacher's text for {len(found)} prompts"
    with options.reporter.phase(name, len(found)) as advance:
        written = _answers(text, teacher, found, advance)
    ends = set(end_ids(teacher.model, teacher.tokenizer).tolist())
    texts = teacher.tokenizer.batch_decode(written, skip_special_tokens=True)
    lines = [
        {"text": said, "ended": ids[-1] in ends, "ids": ids} for said, ids in zip(texts, written, strict=True)
    ]
    write_lines(record.folder / FILE, lines)
    record.write_provenance(provenance(threads=torch.get_num_threads(), device=device()))
    cut = sum(not line["ended"] for line in lines)
    record.finish(rows=len(lines), truncated=cut / max(1, len(lines)))


def _answers(
    text: TextSpec, teacher: artifacts.Loaded, found: Sequence[Example], advance: Callable[[int], None]
) -> list[list[int]]:
    """Token ids of each row's answer, in the rows' order; rows of like length are answered together."""
    how, tokenizer = text.text, teacher.tokenizer
    noise = None
    if how.decoding == "sample":
        noise = uniforms(how.seed, 0, "teacher's text", len(found), text.max_output_tokens)
    order = sorted(range(len(found)), key=lambda n: len(found[n].prompt_ids))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), ROWS_AT_ONCE):
        chosen = order[first : first + ROWS_AT_ONCE]
        prompts = collate(
            [found[n] for n in chosen],
            tokenizer.pad_token_id,
            is_encoder_decoder=teacher.model.config.is_encoder_decoder,
        ).to(teacher.model.device)
        done = write(
            teacher.model,
            prompts,
            max_new_tokens=text.max_output_tokens,
            end_ids=end_ids(teacher.model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            uniforms=None if noise is None else noise[chosen],
            temperature=how.temperature or 1.0,
            num_beams=how.num_beams or 1,
            length_penalty=how.length_penalty or 0.0,
        )
        for n, ids, mask in zip(chosen, done.completion_ids, done.completion_mask.bool(), strict=True):
            answers[n] = ids[mask].tolist()
        advance(len(answers))
    return [answers[n] for n in range(len(found))]
