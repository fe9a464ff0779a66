"""A LoRA adapter (Hu et al. 2022) that a cell trains instead of its student's weights, by peft."""

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, Family, SftModel
from gkd_lab.config.errors import ConfigError, suggest_choices
from gkd_lab.config.fingerprint import Frozen

ALL_LINEAR = "all-linear"
LoraDropout = Annotated[float, Field(ge=0, lt=1)]


def _check_targets_form(value: Any) -> Any:
    """Return a value unchanged if it can be the targets of an adapter; PydanticCustomError if not."""
    is_list = isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)
    if is_list or value in (ALL_LINEAR, None):
        return value
    raise PydanticCustomError(
        "lora_targets", f"must be a list of linear layers, such as [q_proj, v_proj], or {ALL_LINEAR}"
    )


LoraTargets = Annotated[
    Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)],
    BeforeValidator(_check_targets_form),
]

_T5_ATTENTION, _T5_FEED_FORWARD = ("q", "k", "v", "o"), ("wi_0", "wi_1", "wo")
_MADE_LAYER_PARTS: dict[Family, dict[str, tuple[str, ...]]] = {
    "decoder-only": {
        "model.layers.{}.self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "model.layers.{}.mlp": ("gate_proj", "up_proj", "down_proj"),
    },
    "encoder-decoder": {
        "encoder.block.{}.layer.0.SelfAttention": _T5_ATTENTION,
        "encoder.block.{}.layer.1.DenseReluDense": _T5_FEED_FORWARD,
        "decoder.block.{}.layer.0.SelfAttention": _T5_ATTENTION,
        "decoder.block.{}.layer.1.EncDecAttention": _T5_ATTENTION,
        "decoder.block.{}.layer.2.DenseReluDense": _T5_FEED_FORWARD,
    },
}
"""Modules of one layer of a model made from scratch -> names of their linear layers."""


class LoraSpec(Frozen):
    """A LoRA adapter. The names are peft's without its prefixes: `lora_alpha`, `target_modules`, ..."""

    r: PositiveInt = Field(default=8, description="rank")
    alpha: PositiveFloat = Field(default=16, description="the update is scaled by alpha / r")
    targets: LoraTargets = Field(
        default="all-linear", description="names of linear layers; all-linear: all but the head"
    )
    dropout: LoraDropout = Field(default=0.0, description="of the adapter's input")


def check_lora(lora: LoraSpec, student: SftModel) -> None:
    """Raise ConfigError for a classifier, and if a model made from scratch lacks a target.

    The layers of a loaded model are checked when a run begins.
    """
    if student.family in CLASSIFIER_FAMILIES:
        raise ConfigError(
            f"student.lora: adapters are for language models, and those of {student.task} are classifiers: "
            "leave lora out, or use GKDTrainer with `peft_config`"
        )
    architecture = student.model.architecture
    if architecture is not None:
        check_targets(lora, student.model.name, list_made_layers(student.family, architecture.layers))


def check_peft_is_installed() -> None:
    """Raise ConfigError, which names the extra to install, if the package peft is missing; import nothing."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("student.lora needs the package peft: pip install 'gkd-lab[peft]'")


def list_made_layers(family: Family, layers: int) -> Iterator[str]:
    """Yield the dotted names of the linear layers of a model made from scratch, with `layers` of each stack.

    Its head is left out: it is tied to the embeddings.
    """
    for module, names in _MADE_LAYER_PARTS[family].items():
        for layer in range(layers):
            yield from (f"{module.format(layer)}.{name}" for name in names)


def check_targets(lora: LoraSpec, model_name: str, linear_layers: Iterable[str]) -> None:
    """Raise ConfigError if a target is no dotted name, nor the end of one, among a model's linear layers.

    The message has the nearest names.
    """
    paths = [f".{path}" for path in linear_layers]
    for target in () if isinstance(lora.targets, str) else lora.targets:
        if not any(path.endswith(f".{target}") for path in paths):
            names = dict.fromkeys(path.rpartition(".")[2] for path in paths)
            raise ConfigError(
                f"student.lora.targets: model {model_name!r} has no linear layer {target!r}; "
                f"{suggest_choices(target, names)}, or {ALL_LINEAR} instead of a list"
            )
