"""Teachers and starting students: built once under a lock, found by fingerprint, shared by all cells."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from filelock import Timeout
from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, SftModel
from gkd_lab.config.cell import Role
from gkd_lab.models.build import (
    PRECISION_DTYPES,
    count_trainable_parameters,
    hide_progress_bars,
    load_model,
    load_tokenizer,
    make_model,
    train_tokenizer,
)
from gkd_lab.models.pretrained import load_pretrained
from gkd_lab.runner.dataset import build_text_pairs, encode_examples, load_split, write_split_report
from gkd_lab.runner.failures import RecordedFailure, record_failures
from gkd_lab.runner.repair import find_damaged_file, quarantine_damaged_result, repair_unfinished_training
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.sft import fine_tune
from gkd_lab.store import Record
from gkd_lab.store.provenance import collect_provenance
from gkd_lab.tasks import get_task
from gkd_lab.training.checkpoints import create_folder_atomically, list_complete_steps


class ArtifactFailed(RuntimeError):
    """A model that cells need could not be built; its record holds the traceback."""


@dataclass(frozen=True)
class LoadedModel:
    """An artifact in memory; in a teacher's place also what knows what it says."""

    model: PreTrainedModel
    tokenizer: Any


def ensure_artifact(role: Role, model: SftModel, scale: str, options: RunOptions) -> Record:
    """The finished record of an artifact, built now if it is not there. Raises ArtifactFailed."""
    record = options.store.get_artifact(scale, role, model)
    if record.read_status().get("state") == "done" and find_damaged_file(record) is None:
        return record
    with hold_record_lock(record, role, options):
        quarantine_damaged_result(record, options)
        state = record.read_status().get("state")
        if state == "failed" and not options.retry_failed:
            raise ArtifactFailed(_format_failure(role, record))
        if state != "done":
            record.clear_failure()
            try:
                with record_failures([record], options.outputs):
                    _build_artifact(role, model, record, options)
            except RecordedFailure as error:
                raise ArtifactFailed(_format_failure(role, record)) from error
    return record


@contextmanager
def hold_record_lock(record: Record, description: str, options: RunOptions) -> Iterator[None]:
    """The record's lock; says so when another process has it."""
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


def _format_failure(role: str, record: Record) -> str:
    error = record.read_status().get("error", "unknown")
    return f"the {role} failed: {error} (see {record.status_file}; --retry-failed tries again)"


def load_artifact(record: Record, model: SftModel) -> LoadedModel:
    """A finished artifact as model and tokenizer."""
    return LoadedModel(
        load_model(record.checkpoint, model.family, model.precision),
        load_tokenizer(record.checkpoint),
    )


def _build_artifact(role: Role, model: SftModel, record: Record, options: RunOptions) -> None:
    record.write_spec(model, role=role)
    repair_unfinished_training(record, options)
    train = load_split(model.task, model.data, "train", options.cache_folder)
    loaded = _create_initial_model(model, train)
    found, cut = encode_examples(model, loaded.tokenizer, train)
    write_split_report(record.folder, "train", cut)
    if cut.prompts or cut.completions:
        options.reporter.say(
            f"{model.task}: {cut.prompts} prompts and {cut.completions} targets of {cut.rows} exceed "
            f"{model.max_input_tokens} and {model.max_output_tokens} tokens and were cut"
        )
    count = count_trainable_parameters(loaded.model)
    if model.sft is not None:
        name = f"{model.task}: {role} {model.model.name}, {_format_parameter_count(count)} parameters, SFT"
        done = max(list_complete_steps(record.steps_folder), default=0)
        with options.reporter.phase(name, model.sft.steps, done) as advance:
            fine_tune(
                loaded.model,
                loaded.tokenizer,
                found,
                model.sft,
                record,
                advance,
                save_every=options.checkpoint_every,
                log_every=options.log_every,
            )
    export_checkpoint(loaded.model, loaded.tokenizer, record)
    facts = {"parameters": count, "threads": torch.get_num_threads(), "device": select_device()}
    record.write_provenance(collect_provenance(**facts))
    record.finish(parameters=count)


def export_checkpoint(model: PreTrainedModel, tokenizer: Any, record: Record) -> None:
    """A finished model as the record's checkpoint: a plain transformers folder."""
    with create_folder_atomically(record.checkpoint) as folder, hide_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _format_parameter_count(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _create_initial_model(model: SftModel, train: Any) -> LoadedModel:
    """The model before fine-tuning: made from scratch, or loaded."""
    spec = model.model
    if spec.architecture is None:
        return LoadedModel(*load_pretrained(spec, model.family, model.precision))
    read = 1 if model.family in CLASSIFIER_FAMILIES else 2  # a classifier never reads its labels
    words = [text for row in build_text_pairs(model, train) for text in row[:read]]
    tokenizer = train_tokenizer(model.tokenizer, words)
    made = make_model(
        model.family,
        spec.architecture,
        tokenizer,
        seed=spec.init_seed,
        max_tokens=model.max_input_tokens + model.max_output_tokens,
        dropout=model.dropout,
        labels=get_task(model.task).labels,
    )
    return LoadedModel(made.to(PRECISION_DTYPES[model.precision]), tokenizer)
