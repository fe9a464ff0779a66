"""What a cell says of layers to match, held against what is known of its models before they are made."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from gkd_lab.config.cell import SftModel, Training
from gkd_lab.config.errors import SpecError
from gkd_lab.config.layer_maps import UNIFORM, pairs_of
from gkd_lab.config.loss_terms import AttentionsObjective, OfLayers

Stack = Literal["decoder", "encoder"]


def check_matching(training: Training) -> None:
    """Raises SpecError for a layer or a stack that a model does not have, and for maps that are not given.

    How many layers a checkpoint has is what its `config.json` says; where that is not at hand (a name on a
    hub, a .gguf file), it shows when the checkpoint is loaded: the trainer checks the same.
    """
    for one in training.objectives:
        if isinstance(one, OfLayers):
            try:
                _check(one, training)
            except SpecError as error:
                raise SpecError(f"objectives: {one.divergence}: {error}") from error


def _check(one: OfLayers, training: Training) -> None:
    family = training.start.family
    if one.stack == "encoder" and family != "encoder-decoder":
        raise SpecError("stack 'encoder': the models have one stack; the nearest valid value is 'decoder'")
    if isinstance(one, AttentionsObjective) and (family, training.precision) == ("decoder-only", "fp64"):
        raise SpecError(
            "precision 'fp64': the attention that gives maps is NaN beside padding then; "
            "the nearest valid value is 'fp32'"
        )
    if one.layers != UNIFORM:
        depths = (depth(model, one.stack) or sys.maxsize for model in (training.start, training.teacher))
        pairs_of(one.layers, *depths, first=one.first)


def depth(model: SftModel, stack: Stack) -> int | None:
    """Layers of a stack; None where a checkpoint knows it alone."""
    spec = model.model
    if spec.architecture is not None:
        return spec.architecture.layers
    if spec.keep_layers is not None:
        return spec.keep_layers if isinstance(spec.keep_layers, int) else len(spec.keep_layers)
    return None if spec.path is None else _said(Path(spec.path) / "config.json", stack)


def _said(config: Path, stack: Stack) -> int | None:
    """What a checkpoint's configuration says of its depth, under the names that models have for it."""
    try:
        said = json.loads(config.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    names = (*_OF_STACK[stack], *_OF_ALL)
    found = [said[name] for name in names if isinstance(said.get(name), int)]
    return found[0] if found else None


_OF_STACK: Mapping[Stack, tuple[str, ...]] = {
    "encoder": ("encoder_layers",),  # BART's
    "decoder": ("decoder_layers", "num_decoder_layers"),  # BART's and T5's
}
_OF_ALL = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
