"""Teachers and SFT students: built once under a lock, found by fingerprint, shared by all cells."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, SftModel
from gkd_lab.config.cell import Role
from gkd_lab.config.library_errors import explain_model_errors
from gkd_lab.models.build import (
    PRECISION_DTYPES,
    count_trainable_parameters,
    hide_progress_bars,
    load_model,
    load_tokenizer,
    make_model,
    train_tokenizer,
)
from gkd_lab.models.packing import Pack
from gkd_lab.models.pretrained import load_pretrained
from gkd_lab.runner.dataset import build_text_pairs, encode_examples, load_split, write_split_report
from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.greedy_scores import score_greedily
from gkd_lab.runner.outcome import format_artifact_failure
from gkd_lab.runner.repair import find_damaged_file, quarantine_damaged_result, repair_unfinished_training
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.sft import fine_tune
from gkd_lab.store import Record
from gkd_lab.store.provenance import collect_provenance
from gkd_lab.tasks import RowList, get_task
from gkd_lab.training.checkpoints import create_folder_atomically, list_complete_steps

MAX_TRAIN_SCORE_ROWS = 200
"""Training rows on which a fine-tuned model is scored, to tell whether it has learned them."""


class ArtifactFailed(RuntimeError):
    """A model that cells need could not be built; its record holds the traceback."""


@dataclass(frozen=True)
class LoadedModel:
    """Model and tokenizer in memory; for a teacher, the model may be a `ModelFreeTeacher`."""

    model: PreTrainedModel
    tokenizer: Any


def ensure_artifact(role: Role, model: SftModel, scale: str, options: RunOptions) -> Record:
    """Return the done record of a teacher or SFT student, built now if missing; ArtifactFailed if it failed.

    A damaged model is built again. A stored failure raises too, unless `--retry-failed` clears it. The record
    is locked while it is built.
    """
    record = options.store.get_artifact(scale, role, model)
    if record.read_status().get("state") == "done" and find_damaged_file(record) is None:
        return record
    with hold_record_lock(record, role, options):
        quarantine_damaged_result(record, options)
        state = record.read_status().get("state")
        if state == "failed" and not options.retry_failed:
            raise ArtifactFailed(format_artifact_failure(role, record))
        if state != "done":
            record.clear_failure()
            try:
                with record_failures([record], options.outputs):
                    _build_artifact(role, model, record, options)
            except RecordedFailure as error:
                raise ArtifactFailed(format_artifact_failure(role, record)) from error
    return record


def ensure_teacher_output(
    record: Record, description: str, build: Callable[[Record], None], options: RunOptions
) -> Record:
    """Return a record, after `build(record)` if missing or damaged; a stored failed record is returned too.

    The record is that of a teacher's text or scores, locked during `build`. A stored failure stays unless
    `--retry-failed` clears it: the caller checks the status. Raises RecordedFailure where `build` fails now.
    """
    if record.read_status().get("state") != "done" or find_damaged_file(record) is not None:
        with hold_record_lock(record, description, options):
            quarantine_damaged_result(record, options)
            if options.retry_failed:
                record.clear_failure()
            if not record.read_status():
                with record_failures([record], options.outputs):
                    build(record)
    return record


@contextmanager
def hold_record_lock(record: Record, description: str, options: RunOptions) -> Iterator[None]:
    """Hold a record's lock in the block; wait for it without limit, saying so if another process has it."""
    lock = record.lock()
    try:
        lock.acquire(timeout=1)
    except Timeout:
        options.reporter.say(f"waiting for another process that works on the {description}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def load_artifact(record: Record, model: SftModel) -> LoadedModel:
    """Load model and tokenizer of a finished record's checkpoint, in the precision of its spec."""
    with explain_model_errors(str(record.checkpoint), "the model in"):
        return LoadedModel(
            load_model(record.checkpoint, model.family, model.precision), load_tokenizer(record.checkpoint)
        )


def _build_artifact(role: Role, model: SftModel, record: Record, options: RunOptions) -> None:
    """Create the model, fine-tune it if its spec has `sft`, export its checkpoint, mark the record done."""
    record.write_spec(model, role=role)
    repair_unfinished_training(record, options)
    rows = load_split(model.task, model.data, "train", options.cache_folder)
    loaded = _create_initial_model(role, model, rows)
    examples, report = encode_examples(model, loaded.tokenizer, rows)
    if model.sft is not None:
        examples = examples[: model.sft.rows]
    write_split_report(record.folder, "train", report)
    if report.prompts or report.completions:
        options.reporter.say(
            f"{model.task}: {report.prompts} prompts and {report.completions} targets of {report.rows} "
            f"exceed {model.max_input_tokens} and {model.max_output_tokens} tokens and were cut"
        )
    parameters = count_trainable_parameters(loaded.model)
    if model.sft is not None:
        phase = f"{model.task}: {role} {model.model.name}, {parameters / 1e6:.2f} M parameters, SFT"
        done_steps = max(list_complete_steps(record.steps_folder), default=0)
        with options.reporter.phase(
            phase, model.sft.steps, done_steps, folders=[record.folder], work="SFT", unit="steps"
        ) as update_progress:
            fine_tune(
                loaded.model,
                loaded.tokenizer,
                examples,
                model.sft,
                record,
                update_progress,
                save_every=options.checkpoint_every,
                log_every=options.log_every,
            )
    export_checkpoint(loaded.model, loaded.tokenizer, record.checkpoint)
    record.write_provenance(
        collect_provenance(parameters=parameters, threads=torch.get_num_threads(), device=select_device())
    )
    train_score = {} if model.sft is None else _measure_train_score(model, loaded, rows, examples)
    record.finish(parameters=parameters, **train_score)


def _measure_train_score(
    model: SftModel, loaded: LoadedModel, rows: RowList, examples: Sequence[Any]
) -> dict[str, Any]:
    """Return `train_score`, the task's first metric on the first rows that the model was fine-tuned on."""
    count = min(MAX_TRAIN_SCORE_ROWS, len(examples))
    metric = get_task(model.task).metrics[0]
    pack = Pack.build_single(loaded.model.to(select_device()))
    (value,) = score_greedily(
        pack, loaded.tokenizer, rows[:count], examples[:count], model.max_output_tokens, metric
    )
    return {"train_score": {"metric": metric, "value": round(value, 3), "rows": count}}


def export_checkpoint(model: PreTrainedModel, tokenizer: Any, target: Path) -> None:
    """Save model and tokenizer as the folder `target`, by rename; no status is written."""
    with create_folder_atomically(target) as folder, hide_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _create_initial_model(role: Role, model: SftModel, rows: RowList) -> LoadedModel:
    """Return model and tokenizer before SFT: pretrained, or random with a tokenizer trained on the rows.

    ConfigError: a pretrained model that cannot be loaded.
    """
    spec = model.model
    if spec.architecture is None:
        name = "student" if role == "start" else role
        with explain_model_errors(spec.path or spec.pretrained or "", name):
            return LoadedModel(*load_pretrained(spec, model.family, model.precision))
    text_count = 1 if model.family in CLASSIFIER_FAMILIES else 2  # a classifier does not read its labels
    texts = [text for pair in build_text_pairs(model, rows) for text in pair[:text_count]]
    tokenizer = train_tokenizer(model.tokenizer, texts)
    new_model = make_model(
        model.family,
        spec.architecture,
        tokenizer,
        seed=spec.init_seed,
        max_tokens=model.max_input_tokens + model.max_output_tokens,
        dropout=model.dropout,
        labels=get_task(model.task).labels,
    )
    return LoadedModel(new_model.to(PRECISION_DTYPES[model.precision]), tokenizer)
