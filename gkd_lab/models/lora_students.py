"""LoRA students of experiments, by peft: add, save, restore, load and merge their adapters.

peft is an optional extra, and is imported where it is used.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gkd_lab.config.artifact_specs import Family, SftModel
from gkd_lab.config.cell import Training
from gkd_lab.config.lora import LoraSpec, check_peft_is_installed, check_targets
from gkd_lab.models.build import get_auto_class, load_model
from gkd_lab.models.rng import derive_seed

ADAPTER_CONFIG = "adapter_config.json"
"""File of a folder that holds an adapter alone."""


def import_peft() -> Any:
    """Return the module peft. ConfigError, with the extra to install, if it is missing."""
    check_peft_is_installed()
    import peft

    return peft


# ---- targets ----


def list_linear_layers(model: PreTrainedModel) -> Iterator[str]:
    """Yield the dotted names of a model's linear layers, without a head that is tied to the embeddings.

    An adapter of a tied head cannot be merged, as it would change the embeddings too.
    """
    embeddings = model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight is not embeddings:
            yield name


def check_loaded_targets(trainings: Iterable[Training]) -> None:
    """Raise ConfigError if a loaded student lacks a target of its adapter, by its configuration alone."""
    pairs = {(training.lora, training.start) for training in trainings if training.lora is not None}
    for lora, student in pairs:
        _check_targets_of_configuration(lora, student)


def _check_targets_of_configuration(lora: LoraSpec, student: SftModel) -> None:
    """Raise ConfigError for a target that a loaded student lacks; no weights are read.

    Nothing is checked where the configuration cannot be read: loading the model then says why.
    """
    spec = student.model
    place = spec.path or spec.pretrained
    if place is None or place.endswith(".gguf") or isinstance(lora.targets, str):
        return
    try:
        config = AutoConfig.from_pretrained(
            place, revision=None if spec.path else spec.revision, trust_remote_code=False
        )
    except (OSError, ValueError):
        return
    with torch.device("meta"):
        model = get_auto_class(student.family).from_config(config, trust_remote_code=False)
    # Whether the head is tied is not known before the weights are.
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    check_targets(lora, spec.name, linear)


# ---- training ----


def add_lora_adapter(model: PreTrainedModel, lora: LoraSpec, seed: int, name: str) -> Any:
    """Return the model, frozen, with a new adapter (a `PeftModel`) whose weights are drawn from `seed`.

    At first it computes what the model did: an adapter's second matrix begins at 0. name: the model's, for
    messages. Raises ConfigError for a target that the model lacks.
    """
    peft = import_peft()
    check_targets(lora, name, list_linear_layers(model))
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        lora_dropout=lora.dropout,
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 0, "lora"))
        return peft.get_peft_model(model, config)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Overwrite the weights of a `PeftModel`'s adapter by those that peft has saved in a folder, in place."""
    peft = import_peft()
    peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(folder), device="cpu"))


# ---- saved adapters ----


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Save the adapter of a `PeftModel` as peft does, without model card. base: place of the frozen model."""
    # peft would ask the hub about the vocabulary of a base that is no local folder.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    set_adapter_base(folder, base)


def set_adapter_base(folder: Path, base: str, revision: str | None = None) -> None:
    """Let a saved adapter name the model that it belongs on: a folder, or a hub name and its revision."""
    path = folder / ADAPTER_CONFIG
    fields = json.loads(path.read_bytes()) | {"base_model_name_or_path": base, "revision": revision}
    fields["target_modules"].sort()  # peft writes a set, whose order differs from process to process
    path.write_text(json.dumps(fields, indent=2, sort_keys=True))


def holds_adapter(folder: Path) -> bool:
    """Return whether a checkpoint folder holds an adapter alone, which belongs on another model."""
    return (folder / ADAPTER_CONFIG).is_file()


def load_adapted_model(
    folder: Path, base: Path, family: Family, precision: str, *, merged: bool = False
) -> PreTrainedModel:
    """Load a base checkpoint with the adapter of `folder`: active in its layers, or merged into weights."""
    adapted = import_peft().PeftModel.from_pretrained(load_model(base, family, precision), str(folder))
    model: PreTrainedModel = adapted.merge_and_unload() if merged else adapted.get_base_model()
    return model
