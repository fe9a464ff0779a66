"""Teachers and starting students: built once under a lock, found by fingerprint, shared by all cells."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from filelock import Timeout
from transformers import PreTrainedModel

from gkd_lab.config.cell import CLASSIFIERS, Role, SftModel
from gkd_lab.models.build import (
    DTYPES,
    load_model,
    load_tokenizer,
    make_model,
    parameter_count,
    quiet,
    train_tokenizer,
)
from gkd_lab.models.pretrained import load_pretrained
from gkd_lab.runner.dataset import examples, report_cut, rows, texts
from gkd_lab.runner.failures import PartFailed, kept_by
from gkd_lab.runner.repair import damaged_file, mend_finished, mend_unfinished
from gkd_lab.runner.run_options import RunOptions, device
from gkd_lab.runner.sft import fine_tune
from gkd_lab.store import Record
from gkd_lab.store.provenance import provenance
from gkd_lab.tasks import get_task
from gkd_lab.training.checkpoints import appearing, complete_steps


class ArtifactFailed(RuntimeError):
    """A model that cells need could not be built; its record holds the traceback."""


@dataclass(frozen=True)
class Loaded:
    """An artifact in memory; in a teacher's place also what knows what it says."""

    model: PreTrainedModel
    tokenizer: Any


def ensure(role: Role, model: SftModel, scale: str, options: RunOptions) -> Record:
    """The finished record of an artifact, built now if it is not there. Raises ArtifactFailed."""
    record = options.store.artifact(scale, role, model)
    if record.status().get("state") == "done" and damaged_file(record) is None:
        return record
    with waited_for(record, role, options):
        mend_finished(record, options)
        state = record.status().get("state")
        if state == "failed" and not options.retry_failed:
            raise ArtifactFailed(_why(role, record))
        if state != "done":
            record.forget_failure()
            try:
                with kept_by([record], options.outputs):
                    _build(role, model, record, options)
            except PartFailed as error:
                raise ArtifactFailed(_why(role, record)) from error
    return record


@contextmanager
def waited_for(record: Record, what: str, options: RunOptions) -> Iterator[None]:
    """The record's lock; says so when another process has it."""
    lock = record.lock()
    try:
        lock.acquire(timeout=1)
    except Timeout:
        options.reporter.say(f"waiting for another process that works on the {what}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _why(role: str, record: Record) -> str:
    error = record.status().get("error", "unknown")
    return f"the {role} failed: {error} (see {record.status_file}; --retry-failed tries again)"


def load(record: Record, model: SftModel) -> Loaded:
    """A finished artifact as model and tokenizer."""
    return Loaded(
        load_model(record.checkpoint, model.family, model.precision),
        load_tokenizer(record.checkpoint),
    )


def _build(role: Role, model: SftModel, record: Record, options: RunOptions) -> None:
    record.describe(model, role=role)
    mend_unfinished(record, options)
    train = rows(model.task, model.data, "train", options.cache)
    loaded = _initial(model, train)
    found, cut = examples(model, loaded.tokenizer, train)
    report_cut(record.folder, "train", cut)
    if cut.prompts or cut.completions:
        options.reporter.say(
            f"{model.task}: {cut.prompts} prompts and {cut.completions} targets of {cut.rows} exceed "
            f"{model.max_input_tokens} and {model.max_output_tokens} tokens and were cut"
        )
    count = parameter_count(loaded.model)
    if model.sft is not None:
        name = f"{model.task}: {role} {model.model.name}, {_millions(count)} parameters, SFT"
        done = max(complete_steps(record.steps_folder), default=0)
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
    export(loaded.model, loaded.tokenizer, record)
    facts = {"parameters": count, "threads": torch.get_num_threads(), "device": device()}
    record.write_provenance(provenance(**facts))
    record.finish(parameters=count)


def export(model: PreTrainedModel, tokenizer: Any, record: Record) -> None:
    """A finished model as the record's checkpoint: a plain transformers folder."""
    with appearing(record.checkpoint) as folder, quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _initial(model: SftModel, train: Any) -> Loaded:
    """The model before fine-tuning: made from scratch, or loaded."""
    spec = model.model
    if spec.architecture is None:
        return Loaded(*load_pretrained(spec, model.family, model.precision))
    read = 1 if model.family in CLASSIFIERS else 2  # a classifier never reads its labels
    words = [text for row in texts(model, train) for text in row[:read]]
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
    return Loaded(made.to(DTYPES[model.precision]), tokenizer)
