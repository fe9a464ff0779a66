"""Files of a cell's trained student: a whole model, or with LoRA an adapter on its SFT student.

A record's adapter names its base by the path below the outputs folder, so that records can be moved.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import SftModel, get_artifact_folder
from gkd_lab.config.cell import Cell, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.models.build import hide_progress_bars, load_model, load_tokenizer
from gkd_lab.models.lora_students import (
    holds_adapter,
    load_adapted_model,
    save_adapter,
    set_adapter_base,
)
from gkd_lab.runner.artifacts import export_checkpoint
from gkd_lab.store import Record, Store
from gkd_lab.store.files import read_json
from gkd_lab.training.checkpoints import create_folder_atomically


def save_student(model: Any, tokenizer: Any, cell: Cell, target: Path) -> None:
    """Save a cell's trained model, or with LoRA its adapter, and the tokenizer as the folder `target`."""
    if cell.training.lora is None:
        export_checkpoint(model, tokenizer, target)
        return
    base = Path(get_artifact_folder(cell.scale, "start", cell.training.start)) / "checkpoint"
    with create_folder_atomically(target) as folder, hide_progress_bars():
        save_adapter(model, folder, base.as_posix())
        tokenizer.save_pretrained(folder)


def load_student(
    record: Record, model: SftModel, precision: str, *, is_best: bool = False, merged: bool = False
) -> PreTrainedModel:
    """Load the model of a finished record; an adapter is active in its base's layers, or merged.

    model: the spec of an artifact, or of a cell's SFT student. is_best: the checkpoint that scored best on
    validation rows. ConfigError: the base of an adapter is missing.
    """
    folder = record.best_checkpoint if is_best else record.checkpoint
    if not holds_adapter(folder):
        return load_model(folder, model.family, precision)
    base = find_adapter_base(record).checkpoint
    return load_adapted_model(folder, base, model.family, precision, merged=merged)


def choose_precision(training: Training) -> str:
    """Return the precision of a cell's trained weights: fp64 if it trained in that, else fp32."""
    return "fp64" if training.precision == "fp64" else "fp32"


def read_training(record: Record) -> Training:
    """Return the training in a cell's spec.json. ConfigError: missing or damaged."""
    return Training.model_validate(read_spec(record)["spec"])


def find_adapter_base(record: Record) -> Record:
    """Return the record of the SFT student that a LoRA cell's adapter belongs on. ConfigError: not there."""
    stored = read_spec(record)
    start = Training.model_validate(stored["spec"]).start
    outputs = record.folder.resolve().parents[2]
    base = Store(outputs).get_artifact(stored["scale"], "start", start)
    if base.read_state() != "done" or not base.checkpoint.is_dir():
        raise ConfigError(
            f"{record.folder}: its adapter belongs on the SFT student {base.folder}, which is not there; run "
            "the experiment again, which builds it"
        )
    return base


def export_record(record: Record, target: Path, *, merged: bool = False, is_best: bool = False) -> str:
    """Copy a finished record's student and tokenizer into the new folder `target`; return what it holds.

    An adapter is written with a reference to its base, or merged: a plain model. ConfigError: the record is
    not finished or has no such checkpoint, there is nothing to merge, or `target` is not empty.
    """
    _check_is_exportable(record, is_best=is_best)
    source = record.best_checkpoint if is_best else record.checkpoint
    if merged and not holds_adapter(source):
        raise ConfigError(f"{record.folder}: it was trained without LoRA, so it is whole: leave --merged out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"-o {str(target)!r} is there already; name a new folder")
    if merged:
        training = read_training(record)
        model = load_student(record, training.start, choose_precision(training), is_best=is_best, merged=True)
        export_checkpoint(model, load_tokenizer(source), target)
        return "model, its adapter merged"
    base, revision = _name_base(record) if holds_adapter(source) else (None, None)
    with create_folder_atomically(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        if base is not None:
            set_adapter_base(folder, base, revision)
    return "model" if base is None else f"adapter on {base}"


def _check_is_exportable(record: Record, *, is_best: bool) -> None:
    """Raise ConfigError unless the record is a finished model, with a best checkpoint if one is wanted."""
    state = record.read_state()
    if state != "done":
        raise ConfigError(f"{record.folder}: its training is {state}, finish it first")
    if not record.checkpoint.is_dir():
        raise ConfigError(f"{record.folder}: it holds no model; give a cell, a teacher or an SFT student")
    if is_best and not record.best_checkpoint.is_dir():
        raise ConfigError(f"{record.folder}: it has no best checkpoint: eval_every was not set")


def _name_base(record: Record) -> tuple[str, str | None]:
    """Return the base that an exported adapter names: (hub name, revision), or (the base's folder, None)."""
    base, start = find_adapter_base(record), read_training(record).start
    if start.is_hub_checkpoint:
        return str(start.model.pretrained), start.model.revision
    return str(base.checkpoint.resolve()), None


def read_spec(record: Record) -> Mapping[str, Any]:
    """Return a record's spec.json. ConfigError: missing or damaged."""
    spec: Mapping[str, Any] | None = read_json(record.folder / "spec.json")
    if spec is None or "spec" not in spec:
        raise ConfigError(f"{record.folder}: spec.json is missing or damaged")
    return spec
