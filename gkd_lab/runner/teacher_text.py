"""Teacher completions of the training prompts: written once under a lock, shared by all cells."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from gkd_lab.config.artifact_specs import TeacherTextSpec
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import encode_examples, load_split
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.store import Record
from gkd_lab.store.files import read_json_lines, write_json_lines
from gkd_lab.store.provenance import collect_provenance
from gkd_lab.training.sampling import collect_end_ids, generate_completions

BATCH_ROWS = 256
TEXTS_FILE = "texts.jsonl"


def ensure_teacher_text(text: TeacherTextSpec, scale: str, options: RunOptions) -> Record:
    """Return the record of a teacher's text, generated now if missing; it may be a stored failed record.

    Raises RecordedFailure where generating fails now; `apply_teacher_text` raises for a failed record.
    """
    record = options.store.get_teacher_text(scale, text)
    build = partial(_write_teacher_text, text=text, scale=scale, options=options)
    return artifacts.ensure_teacher_output(record, "teacher's text", build, options)


def apply_teacher_text(
    examples: Sequence[Example], record: Record, samples: int | None = None
) -> list[Example]:
    """Return the examples with the teacher's stored token ids as completions. ValueError if the text failed.

    With several samples the examples follow each other once for each. The same error where there is not one
    text per example and sample.
    """
    examples = [*examples] * (samples or 1)
    status = record.read_status()
    if status.get("state") != "done":
        raise ValueError(f"the teacher's text failed: {status.get('error')} (see {record.status_file})")
    completions = read_json_lines(record.folder / TEXTS_FILE)
    if len(completions) != len(examples):
        path = record.folder / TEXTS_FILE
        raise ValueError(f"{path} has {len(completions)} texts for {len(examples)} prompts: delete it")
    return [
        replace(example, completion_ids=completion["ids"])
        for example, completion in zip(examples, completions, strict=True)
    ]


def _write_teacher_text(record: Record, text: TeacherTextSpec, scale: str, options: RunOptions) -> None:
    """Generate the teacher's completions of all training prompts, write `texts.jsonl`, finish the record."""
    record.write_spec(text)
    teacher = artifacts.load_artifact(
        artifacts.ensure_artifact("teacher", text.teacher, scale, options), text.teacher
    )
    teacher.model.to(select_device())
    rows = load_split(text.task, text.data, "train", options.cache_folder)
    examples, _ = encode_examples(text.teacher, teacher.tokenizer, rows)
    examples = examples[: text.rows] * (text.text.samples or 1)
    phase = f"{text.task}: teacher's text for {len(examples)} prompts"
    with options.reporter.phase(
        phase, len(examples), folders=[record.folder], work="text"
    ) as update_progress:
        completion_ids = _generate_in_batches(text, teacher, examples, update_progress)
    end_ids = set(collect_end_ids(teacher.model, teacher.tokenizer).tolist())
    texts = teacher.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    completions = [
        {"text": completion, "ended": ids[-1] in end_ids, "ids": ids}
        for completion, ids in zip(texts, completion_ids, strict=True)
    ]
    write_json_lines(record.folder / TEXTS_FILE, completions)
    record.write_provenance(collect_provenance(threads=torch.get_num_threads(), device=select_device()))
    truncated = sum(not completion["ended"] for completion in completions)
    record.finish(rows=len(completions), truncated=truncated / max(1, len(completions)))


def _generate_in_batches(
    text: TeacherTextSpec,
    teacher: artifacts.LoadedModel,
    examples: Sequence[Example],
    update_progress: Callable[[int], None],
) -> list[list[int]]:
    """Return unpadded token ids of one completion per example, in their order; batches are by length."""
    decoding, tokenizer = text.text, teacher.tokenizer
    end_ids = collect_end_ids(teacher.model, tokenizer)
    uniforms = None
    if decoding.decoding == "sample":
        uniforms = draw_uniforms(decoding.seed, 0, "teacher's text", len(examples), text.max_output_tokens)
    by_length = sorted(range(len(examples)), key=lambda n: len(examples[n].prompt_ids))
    completions: dict[int, list[int]] = {}
    for start in range(0, len(by_length), BATCH_ROWS):
        indices = by_length[start : start + BATCH_ROWS]
        prompts = collate_examples(
            [examples[n] for n in indices],
            tokenizer.pad_token_id,
            is_encoder_decoder=teacher.model.config.is_encoder_decoder,
        ).to(teacher.model.device)
        batch = generate_completions(
            teacher.model,
            prompts,
            max_new_tokens=text.max_output_tokens,
            end_ids=end_ids,
            pad_id=tokenizer.pad_token_id,
            uniforms=None if uniforms is None else uniforms[indices],
            temperature=decoding.temperature or 1.0,
            num_beams=decoding.num_beams or 1,
            length_penalty=decoding.length_penalty or 0.0,
            length_penalty_form=decoding.length_penalty_form,
        )
        for n, ids, mask in zip(indices, batch.completion_ids, batch.completion_mask.bool(), strict=True):
            completions[n] = ids[mask].tolist()
        update_progress(len(completions))
    return [completions[n] for n in range(len(examples))]
