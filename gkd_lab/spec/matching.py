"""What a cell says of layers to match, held against what is known of its models before they are made."""

import sys

from gkd_lab.spec.cell import SftModel, Training
from gkd_lab.spec.errors import SpecError
from gkd_lab.spec.layer_maps import UNIFORM, pairs_of
from gkd_lab.spec.objectives import AttentionsObjective, OfLayers


def check_matching(training: Training) -> None:
    """Raises SpecError for a layer or a stack that a model does not have, and for maps that are not given.

    How many layers a checkpoint has shows only when it is loaded; the trainer checks the same.
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
        depths = (depth(model) or sys.maxsize for model in (training.start, training.teacher))
        pairs_of(one.layers, *depths, first=one.first)


def depth(model: SftModel) -> int | None:
    """Layers of each stack; None where a checkpoint knows it alone."""
    spec = model.model
    if spec.architecture is not None:
        return spec.architecture.layers
    return spec.keep_layers if isinstance(spec.keep_layers, int | None) else len(spec.keep_layers)
