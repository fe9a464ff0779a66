"""What a cell says of layers to match, held against what is known of its models before they are made."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.layer_maps import UNIFORM, resolve_layer_pairs
from gkd_lab.config.loss_terms import AttentionsConfig, LayerTerm

Stack = Literal["decoder", "encoder"]


def check_layer_terms(training: Training) -> None:
    """Raises SpecError for a layer or a stack that a model does not have, and for maps that are not given.

    How many layers a checkpoint has is what its `config.json` says; where that is not at hand (a name on a
    hub, a .gguf file), it shows when the checkpoint is loaded: the trainer checks the same.
    """
    for one in training.objectives:
        if isinstance(one, LayerTerm):
            try:
                _check_layer_term(one, training)
            except ConfigError as error:
                raise ConfigError(f"objectives: {one.divergence}: {error}") from error


def _check_layer_term(term: LayerTerm, training: Training) -> None:
    family = training.start.family
    if term.stack == "encoder" and family != "encoder-decoder":
        raise ConfigError("stack 'encoder': the models have one stack; the nearest valid value is 'decoder'")
    if isinstance(term, AttentionsConfig) and (family, training.precision) == ("decoder-only", "fp64"):
        raise ConfigError(
            "precision 'fp64': the attention that gives maps is NaN beside padding then; "
            "the nearest valid value is 'fp32'"
        )
    if term.layers != UNIFORM:
        depths = (
            get_stack_depth(model, term.stack) or sys.maxsize for model in (training.start, training.teacher)
        )
        resolve_layer_pairs(term.layers, *depths, lowest_layer=term.first)


def get_stack_depth(model: SftModel, stack: Stack) -> int | None:
    """Layers of a stack; None where a checkpoint knows it alone."""
    spec = model.model
    if spec.architecture is not None:
        return spec.architecture.layers
    if spec.keep_layers is not None:
        return spec.keep_layers if isinstance(spec.keep_layers, int) else len(spec.keep_layers)
    return None if spec.path is None else _read_checkpoint_depth(Path(spec.path) / "config.json", stack)


def _read_checkpoint_depth(config: Path, stack: Stack) -> int | None:
    """What a checkpoint's configuration says of its depth, under the names that models have for it."""
    try:
        said = json.loads(config.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    names = (*_STACK_DEPTH_KEYS[stack], *_DEPTH_KEYS)
    found = [said[name] for name in names if isinstance(said.get(name), int)]
    return found[0] if found else None


_STACK_DEPTH_KEYS: Mapping[Stack, tuple[str, ...]] = {
    "encoder": ("encoder_layers",),  # BART's
    "decoder": ("decoder_layers", "num_decoder_layers"),  # BART's and T5's
}
_DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
